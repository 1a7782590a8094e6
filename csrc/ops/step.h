// What the ops of one step share.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/thread_pool.h"
#include "ops/batch.h"
#include "ops/ops.h"

namespace kt {

// A piece of attention: consecutive query rows of one sequence.
struct QueryRows {
  int64_t sequence, first_token, rows, first_position;
};

// The step in hand. Values, weights and buffers are fixed when a program is built, so they are not in here: the ops
// hold pointers to them.
struct Step {
  Batch batch;
  std::vector<int64_t> positions;     // [tokens]
  std::vector<int64_t> token_block;   // [tokens] block that the token's KV goes to
  std::vector<QueryRows> query_rows;  // the most work first

  int64_t rows(Rows kind) const {
    return static_cast<int64_t>(kind == Rows::kTokens ? batch.tokens.size() : batch.logit_rows.size());
  }
};

// Where the values of a program live: value v has rows of widths[v] floats from data[v], strides[v] apart. That is their
// width, but for those of logits.
struct Values {
  std::vector<float*> data;
  std::vector<int64_t> widths, strides;
};

// Work that each row can do without the others: rows [begin, end).
using RowFunction = std::function<void(const Step&, int64_t begin, int64_t end)>;

// Work that needs all rows of what came before; parallel inside.
using WholeFunction = std::function<void(const Step&)>;

// Query rows of one attention task: long enough to share each key and value, short enough to balance.
inline constexpr int64_t kQueryRows = 16;

}  // namespace kt
