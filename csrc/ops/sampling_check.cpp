#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "ops/sampler.h"

namespace kt {
namespace {

[[noreturn]] void fail(const char* name, size_t i, const std::string& what) {
  throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "]: " + what);
}

template <class T>
std::string in(T value, T low, T high) {
  std::ostringstream text;
  text << value << " is not in [" << low << ", " << high << "]";
  return text.str();
}

template <class T>
void check_size(const char* name, std::span<T> values, int64_t expected) {
  if (static_cast<int64_t>(values.size()) != expected)
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(values.size()) + " entries, expected " +
                                std::to_string(expected));
}

// Refuses NaN too.
void check_floats(const char* name, std::span<const float> values, int64_t rows, float low, float high) {
  check_size(name, values, rows);
  for (size_t i = 0; i < values.size(); ++i)
    if (!(values[i] >= low && values[i] <= high))
      fail(name, i, in(values[i], low, high));
}

void check_ints(const char* name, std::span<const int32_t> values, int64_t low, int64_t high) {
  for (size_t i = 0; i < values.size(); ++i)
    if (values[i] < low || values[i] > high) fail(name, i, in<int64_t>(values[i], low, high));
}

void check_starts(const char* name, std::span<const int32_t> starts, int64_t rows, size_t end) {
  check_size(name, starts, rows + 1);
  if (starts[0] != 0) fail(name, 0, "must be 0");
  for (int64_t i = 0; i < rows; ++i)
    if (starts[i + 1] < starts[i]) fail(name, i + 1, "must not descend");
  if (static_cast<size_t>(starts[rows]) != end) fail(name, rows, "must be " + std::to_string(end));
}

}  // namespace

void check_sampling(const Sampling& p, const Drawn& drawn, int64_t rows, int64_t vocab) {
  constexpr float kMost = std::numeric_limits<float>::max(), kLeast = std::numeric_limits<float>::min();
  constexpr int32_t kMostInt = std::numeric_limits<int32_t>::max();
  check_floats("temperature", p.temperature, rows, 0.0f, kMost);
  check_size("top_k", p.top_k, rows);
  check_ints("top_k", p.top_k, 0, kMostInt);
  check_floats("top_p", p.top_p, rows, kLeast, 1.0f);
  check_floats("min_p", p.min_p, rows, 0.0f, 1.0f);
  check_floats("repetition", p.repetition, rows, kLeast, kMost);
  check_floats("presence", p.presence, rows, -kMost, kMost);
  check_floats("frequency", p.frequency, rows, -kMost, kMost);
  check_size("seed", p.seed, rows);
  check_size("position", p.position, rows);
  check_size("logprobs", p.logprobs, rows);
  check_ints("logprobs", p.logprobs, -1, kMaxLogprobs);
  check_starts("history_starts", p.history_starts, rows, p.history.size());
  check_ints("history", p.history, 0, vocab - 1);
  check_size("history_output", p.history_output, rows);
  for (int64_t i = 0; i < rows; ++i)
    if (p.history_output[i] < 0 || p.history_output[i] > p.history_starts[i + 1] - p.history_starts[i])
      fail("history_output", i, "lies outside the row's history");
  check_starts("bias_starts", p.bias_starts, rows, p.bias_tokens.size());
  check_ints("bias_tokens", p.bias_tokens, 0, vocab - 1);
  check_size("bias_values", p.bias_values, static_cast<int64_t>(p.bias_tokens.size()));
  for (size_t i = 0; i < p.bias_values.size(); ++i)
    if (!(p.bias_values[i] <= kMost)) fail("bias_values", i, "must be finite or -infinity");
  check_size("token", drawn.token, rows);
  check_size("logprob", drawn.logprob, rows);
  check_size("top_tokens", drawn.top_tokens, rows * kMaxLogprobs);
  check_size("top_logprobs", drawn.top_logprobs, rows * kMaxLogprobs);
}

}  // namespace kt
