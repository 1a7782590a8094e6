// One step's input and output, as engine/batch.py defines them: views of the caller's arrays.
#pragma once
#include <cstdint>
#include <span>

namespace kt {

inline constexpr int64_t kMaxLogprobs = 20;

struct Batch {
  std::span<const int32_t> tokens, starts, context, block_starts, blocks, logit_rows;
  std::span<const int32_t> slots, keep_slots, keep_at;  // empty without states

  int64_t sequences() const { return static_cast<int64_t>(context.size()); }
};

struct Sampling {
  std::span<const float> temperature;
  std::span<const int32_t> top_k;
  std::span<const float> top_p, min_p, repetition, presence, frequency;
  std::span<const int64_t> seed, position;
  std::span<const int32_t> logprobs, history_starts, history, history_output, bias_starts, bias_tokens;
  std::span<const float> bias_values;
};

struct Drawn {
  std::span<int32_t> token;
  std::span<float> logprob;
  std::span<int32_t> top_tokens;  // [rows][kMaxLogprobs]
  std::span<float> top_logprobs;
};

struct BatchLimits {
  int64_t tokens, rows, blocks, vocab, states;
};

// Checks every index of a batch, so that a step cannot leave its memory. std::invalid_argument names the array.
void check_batch(const Batch& batch, const BatchLimits& limits);

}  // namespace kt
