// Draws tokens from logits.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/thread_pool.h"
#include "ops/batch.h"

namespace kt {

// Checks lengths, indices and numbers. std::invalid_argument names the array.
void check_sampling(const Sampling& sampling, const Drawn& drawn, int64_t rows, int64_t vocab);

// The transformations of a row, in this order (that of Hugging Face and vLLM):
//   1. repetition penalty over the history (l > 0 ? l / r : l * r), then frequency and presence over its output part
//   2. logit bias; -inf bans
//   3. temperature; 0 takes the largest
//   4. top_k, 5. top_p of what is left, 6. min_p relative to the likeliest
//   7. one draw by inverse distribution function, over the kept tokens by ascending id
// Equal logits rank by ascending id, so top_k = 1 is exactly temperature 0. The random number is
// Philox4x32-10(key = seed, counter = position): a function of the request alone, not of the batch.
class Sampler {
 public:
  Sampler(const KernelTable& table, int threads, int64_t vocab);

  // logits, rows of [vocab] `stride` floats apart, stay as they are. In parallel over rows. A row with a NaN or infinite logit,
  // or with nothing left to draw, gets token -1; logprob is 0 where none was asked for.
  void draw(ThreadPool& pool, const float* logits, int64_t stride, const Sampling& sampling, const Drawn& drawn);

 private:
  struct Scratch {
    std::vector<float> logits;        // [vocab] after penalties and bias
    std::vector<float> weights;       // [vocab] exp((logit - maximum) / temperature)
    std::vector<float> maxima, sums;  // of each run of kSampleRun logits, weights
    std::vector<float> gathered;
    std::vector<int32_t> counts;  // [vocab] zero between uses
    std::vector<int32_t> kept;    // candidates, by ascending id
    std::vector<uint64_t> ranks;  // of the candidates
  };

  void draw_row(Scratch& s, const float* logits, int64_t row, const Sampling& sampling, const Drawn& drawn) const;
  const float* adjust(Scratch& s, const float* logits, int64_t row, const Sampling& sampling) const;
  int32_t pick(Scratch& s, const float* x, int64_t row, const Sampling& sampling) const;
  int32_t pick_any(const Scratch& s, double target) const;
  int32_t pick_kept(const Scratch& s, double target) const;
  double kept_mass(const Scratch& s) const;
  void keep_largest(Scratch& s, const float* x, int64_t k) const;
  void keep_from(Scratch& s, const float* values, const std::vector<float>& upper, float least) const;
  void rank_kept(Scratch& s, const float* x) const;
  void keep_mass(Scratch& s, const float* x, double mass) const;
  void weigh_kept(Scratch& s, const float* x, float maximum, float temperature) const;
  void report(Scratch& s, const float* logits, int64_t row, int64_t top, const Drawn& drawn) const;

  const KernelTable& table_;
  int64_t vocab_, runs_;
  std::vector<Scratch> scratch_;  // of each thread
};

}  // namespace kt
