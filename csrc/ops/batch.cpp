#include "ops/batch.h"

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernel_table.h"

namespace kt {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

// `starts` must be [0, ..., end], never descending, one longer than what it divides.
void check_starts(const char* name, std::span<const int32_t> starts, int64_t parts, int64_t end) {
  if (static_cast<int64_t>(starts.size()) != parts + 1)
    fail(std::string(name) + ": " + std::to_string(starts.size()) + " entries for " + std::to_string(parts) +
         " sequences");
  if (starts.front() != 0 || starts.back() != end || !std::is_sorted(starts.begin(), starts.end()))
    fail(std::string(name) + ": must rise from 0 to " + std::to_string(end));
}

void check_range(const char* name, std::span<const int32_t> values, int64_t limit) {
  for (size_t i = 0; i < values.size(); ++i)
    if (values[i] < 0 || values[i] >= limit)
      fail(std::string(name) + "[" + std::to_string(i) + "]: " + std::to_string(values[i]) + " is not in [0, " +
           std::to_string(limit) + ")");
}

void check_states(const Batch& b, int64_t states) {
  const size_t sequences = states > 0 ? b.context.size() : 0;
  for (const auto& [name, values] : {std::pair{"slots", b.slots}, {"keep_slots", b.keep_slots}, {"keep_at", b.keep_at}})
    if (values.size() != sequences)
      fail(std::string(name) + ": " + std::to_string(values.size()) + " entries for the states of " +
           std::to_string(sequences) + " sequences");
  check_range("slots", b.slots, states);
  std::vector<int32_t> written(b.slots.begin(), b.slots.end());
  for (size_t s = 0; s < sequences; ++s) {
    if (b.keep_slots[s] == -1) continue;
    check_range("keep_slots", b.keep_slots.subspan(s, 1), states);
    const int64_t after = int64_t{b.keep_at[s]} - b.context[s];
    if (after < 1 || after > b.starts[s + 1] - b.starts[s])
      fail("keep_at[" + std::to_string(s) + "]: " + std::to_string(b.keep_at[s]) + " is not reached by this step");
    written.push_back(b.keep_slots[s]);
  }
  std::sort(written.begin(), written.end());
  if (const auto twice = std::adjacent_find(written.begin(), written.end()); twice != written.end())
    fail("slots: the state in slot " + std::to_string(*twice) + " is written twice");
}

}  // namespace

void check_batch(const Batch& b, const BatchLimits& limits) {
  const int64_t tokens = static_cast<int64_t>(b.tokens.size()), rows = static_cast<int64_t>(b.logit_rows.size());
  if (tokens > limits.tokens)
    fail("tokens: " + std::to_string(tokens) + ", at most " + std::to_string(limits.tokens) + " in a step");
  if (rows > limits.rows)
    fail("logit_rows: " + std::to_string(rows) + ", at most " + std::to_string(limits.rows) + " in a step");
  check_range("tokens", b.tokens, limits.vocab);
  check_starts("starts", b.starts, b.sequences(), tokens);
  check_range("context", b.context, INT32_MAX);
  check_starts("block_starts", b.block_starts, b.sequences(), static_cast<int64_t>(b.blocks.size()));
  check_range("blocks", b.blocks, limits.blocks);
  for (int64_t s = 0; s < b.sequences(); ++s) {
    const int64_t length = int64_t{b.context[s]} + b.starts[s + 1] - b.starts[s];
    const int64_t table = int64_t{b.block_starts[s + 1]} - b.block_starts[s];
    if (table * kBlockTokens < length)
      fail("blocks: sequence " + std::to_string(s) + " has " + std::to_string(table) + " blocks for " +
           std::to_string(length) + " tokens");
  }
  check_range("logit_rows", b.logit_rows, tokens);
  if (std::adjacent_find(b.logit_rows.begin(), b.logit_rows.end(), std::greater_equal<>()) != b.logit_rows.end())
    fail("logit_rows: must ascend");
  check_states(b, limits.states);
}

}  // namespace kt
