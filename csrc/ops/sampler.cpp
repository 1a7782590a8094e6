#include "ops/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

namespace kt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSortedAtOnce = 32;

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter) {
  std::array<uint32_t, 4> c = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

// In [0, 1), with 53 random bits.
double uniform(int64_t seed, int64_t position) {
  const auto r = philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(position));
  return (static_cast<double>(r[0] >> 5) * 67108864.0 + static_cast<double>(r[1] >> 6)) / 9007199254740992.0;
}

// The one ranking, larger logits first, then smaller ids, as a number: to compare two ranks touches no logits.
uint64_t rank_of(float logit, int32_t token) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 ranks as 0
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{~ascending} << 32 | static_cast<uint32_t>(token);
}

int32_t token_of(uint64_t rank) { return static_cast<int32_t>(static_cast<uint32_t>(rank)); }

int32_t largest(const float* x, int64_t n, const std::vector<float>& maxima, float maximum) {
  const int64_t run = std::find(maxima.begin(), maxima.end(), maximum) - maxima.begin();
  const float* end = x + std::min((run + 1) * kSampleRun, n);
  return static_cast<int32_t>(std::find(x + run * kSampleRun, end, maximum) - x);
}

}  // namespace

Sampler::Sampler(const KernelTable& table, int threads, int64_t vocab)
    : table_(table), vocab_(vocab), runs_((vocab + kSampleRun - 1) / kSampleRun), scratch_(threads) {
  for (Scratch& s : scratch_) {
    s.logits.resize(vocab);
    s.weights.resize(vocab);
    s.maxima.resize(runs_);
    s.sums.resize(runs_);
    s.counts.resize(vocab);
    s.gathered.reserve(vocab);
    s.kept.reserve(vocab);
    s.ranks.reserve(vocab);
  }
}

void Sampler::draw(ThreadPool& pool, const float* logits, int64_t stride, const Sampling& sampling, const Drawn& drawn) {
  pool.parallel_for(static_cast<int64_t>(sampling.temperature.size()), [&](int64_t row, int thread) {
    draw_row(scratch_[thread], logits + row * stride, row, sampling, drawn);
  });
}

void Sampler::draw_row(Scratch& s, const float* logits, int64_t row, const Sampling& p, const Drawn& drawn) const {
  std::fill_n(drawn.top_tokens.begin() + row * kMaxLogprobs, kMaxLogprobs, -1);
  std::fill_n(drawn.top_logprobs.begin() + row * kMaxLogprobs, kMaxLogprobs, 0.0f);
  drawn.token[row] = -1;
  drawn.logprob[row] = 0.0f;
  if (!table_.scan_logits(logits, vocab_, s.maxima.data())) return;
  const float* x = adjust(s, logits, row, p);
  if (x != logits) table_.scan_logits(x, vocab_, s.maxima.data());
  drawn.token[row] = pick(s, x, row, p);
  if (p.logprobs[row] < 0 || drawn.token[row] < 0) return;
  if (x != logits) table_.scan_logits(logits, vocab_, s.maxima.data());
  report(s, logits, row, p.logprobs[row], drawn);
}

// Penalties and bias. Gives `logits` itself when there are none, else a changed copy.
const float* Sampler::adjust(Scratch& s, const float* logits, int64_t row, const Sampling& p) const {
  const auto history = p.history.subspan(p.history_starts[row], p.history_starts[row + 1] - p.history_starts[row]);
  const int64_t first_bias = p.bias_starts[row], end_bias = p.bias_starts[row + 1];
  if (history.empty() && first_bias == end_bias) return logits;
  float* x = s.logits.data();
  std::copy_n(logits, vocab_, x);
  // counts: 0 not in the history, else 1 + occurrences in its output part.
  for (size_t i = 0; i < history.size(); ++i) {
    int32_t& count = s.counts[history[i]];
    count = std::max(count, 1) + (static_cast<int64_t>(i) >= p.history_output[row] ? 1 : 0);
  }
  for (const int32_t token : history) {
    if (s.counts[token] == 0) continue;
    const int32_t outputs = s.counts[token] - 1;
    s.counts[token] = 0;
    float l = x[token];
    l = l > 0 ? l / p.repetition[row] : l * p.repetition[row];
    l -= p.frequency[row] * static_cast<float>(outputs);
    if (outputs > 0) l -= p.presence[row];
    x[token] = std::isnan(l) ? kInfinity : l;  // overflow either way; a NaN has no rank
  }
  for (int64_t i = first_bias; i < end_bias; ++i) {
    const float bias = p.bias_values[i];
    float& l = x[p.bias_tokens[i]];
    l = bias == -kInfinity ? bias : l + bias;
  }
  return x;
}

int32_t Sampler::pick(Scratch& s, const float* x, int64_t row, const Sampling& p) const {
  const float maximum = *std::max_element(s.maxima.begin(), s.maxima.end());
  if (!std::isfinite(maximum)) return -1;  // all banned, or a penalty that overflowed
  const float temperature = p.temperature[row], min_p = p.min_p[row];
  if (temperature == 0.0f) return largest(x, vocab_, s.maxima, maximum);
  const double u = uniform(p.seed[row], p.position[row]), top_p = p.top_p[row];
  const int64_t k = p.top_k[row];
  if (k > 0 && k < vocab_) {
    keep_largest(s, x, k);
    weigh_kept(s, x, maximum, temperature);
    if (top_p < 1.0) keep_mass(s, x, top_p * kept_mass(s));
    std::erase_if(s.kept, [&](int32_t i) { return s.weights[i] < min_p; });  // the likeliest weighs 1
  } else {
    table_.exp_logits(x, vocab_, maximum, temperature, s.weights.data(), s.sums.data());
    const double total = std::accumulate(s.sums.begin(), s.sums.end(), 0.0);
    if (top_p >= 1.0 && min_p <= 0.0f) return pick_any(s, u * total);
    // However the mass is spread, top_p drops all that lies below this: together it is less than 1 - top_p.
    const double droppable = 0.999 * (1.0 - top_p) * total / static_cast<double>(vocab_);
    keep_from(s, s.weights.data(), s.sums, std::max(static_cast<float>(droppable), min_p));
    if (top_p < 1.0) keep_mass(s, x, top_p * total);
  }
  return pick_kept(s, u * kept_mass(s));
}

// Draws from all tokens: finds the run, then the token in it.
int32_t Sampler::pick_any(const Scratch& s, double target) const {
  int64_t run = 0;
  while (run + 1 < runs_ && target >= s.sums[run]) target -= s.sums[run++];
  int32_t token = -1;
  for (; run >= 0 && token < 0; --run) {  // backwards only if rounding has left no weight where the target fell
    double sum = 0.0;
    for (int64_t i = run * kSampleRun; i < std::min((run + 1) * kSampleRun, vocab_) && sum <= target; ++i) {
      sum += s.weights[i];
      if (s.weights[i] > 0.0f) token = static_cast<int32_t>(i);
    }
  }
  return token;
}

int32_t Sampler::pick_kept(const Scratch& s, double target) const {
  double sum = 0.0;
  int32_t token = -1;
  for (const int32_t i : s.kept) {
    sum += s.weights[i];
    if (s.weights[i] > 0.0f) token = i;
    if (sum > target) break;
  }
  return token;
}

double Sampler::kept_mass(const Scratch& s) const {
  double sum = 0.0;
  for (const int32_t i : s.kept) sum += s.weights[i];
  return sum;
}

// Tokens whose value is not below `least`, by ascending id; `upper` bounds the values of each run.
void Sampler::keep_from(Scratch& s, const float* values, const std::vector<float>& upper, float least) const {
  s.kept.resize(vocab_);
  int64_t n = 0;
  for (int64_t run = 0; run < runs_; ++run) {
    if (upper[run] < least) continue;
    for (int64_t i = run * kSampleRun; i < std::min((run + 1) * kSampleRun, vocab_); ++i) {
      s.kept[n] = static_cast<int32_t>(i);  // no branch: half of them would be mispredicted
      n += values[i] >= least;
    }
  }
  s.kept.resize(n);
}

void Sampler::rank_kept(Scratch& s, const float* x) const {
  s.ranks.resize(s.kept.size());
  for (size_t i = 0; i < s.kept.size(); ++i) s.ranks[i] = rank_of(x[s.kept[i]], s.kept[i]);
}

// Keeps the k largest of x. The k-th largest of the maxima of runs is not above the k-th largest logit, so only the few
// tokens from there on are looked at.
void Sampler::keep_largest(Scratch& s, const float* x, int64_t k) const {
  float least = -kInfinity;
  if (k <= runs_) {
    s.gathered = s.maxima;
    std::nth_element(s.gathered.begin(), s.gathered.begin() + (k - 1), s.gathered.end(), std::greater<>());
    least = s.gathered[k - 1];
  }
  keep_from(s, x, s.maxima, least);
  if (k >= static_cast<int64_t>(s.kept.size())) return;
  rank_kept(s, x);
  std::nth_element(s.ranks.begin(), s.ranks.begin() + (k - 1), s.ranks.end());
  const uint64_t last = s.ranks[k - 1];
  std::erase_if(s.kept, [&](int32_t i) { return rank_of(x[i], i) > last; });
}

void Sampler::weigh_kept(Scratch& s, const float* x, float maximum, float temperature) const {
  const int64_t n = static_cast<int64_t>(s.kept.size());
  s.gathered.resize(n);
  for (int64_t i = 0; i < n; ++i) s.gathered[i] = x[s.kept[i]];
  table_.exp_logits(s.gathered.data(), n, maximum, temperature, s.gathered.data(), s.sums.data());
  for (int64_t i = 0; i < n; ++i) s.weights[s.kept[i]] = s.gathered[i];
}

// Keeps the shortest prefix of the ranking that weighs `mass` or more: a selection by weight, halving what is undecided.
void Sampler::keep_mass(Scratch& s, const float* x, double mass) const {
  rank_kept(s, x);
  auto begin = s.ranks.begin(), end = s.ranks.end();
  double above = 0.0;
  while (end - begin > kSortedAtOnce) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end);
    double sum = above;
    for (auto i = begin; i != middle; ++i) sum += s.weights[token_of(*i)];
    if (sum >= mass) {
      end = middle;
    } else {
      above = sum;
      begin = middle;
    }
  }
  std::sort(begin, end);
  auto last = begin;
  while (last != end && (above += s.weights[token_of(*last)]) < mass) ++last;
  if (last != end) std::erase_if(s.kept, [&](int32_t i) { return rank_of(x[i], i) > *last; });
}

// Log-probabilities of the raw logits: of the drawn token and of the `top` likeliest.
void Sampler::report(Scratch& s, const float* logits, int64_t row, int64_t top, const Drawn& drawn) const {
  const float maximum = *std::max_element(s.maxima.begin(), s.maxima.end());
  table_.exp_logits(logits, vocab_, maximum, 1.0f, s.weights.data(), s.sums.data());
  const double log_sum = maximum + std::log(std::accumulate(s.sums.begin(), s.sums.end(), 0.0));
  drawn.logprob[row] = static_cast<float>(logits[drawn.token[row]] - log_sum);
  if (top == 0) return;
  keep_largest(s, logits, std::min(top, vocab_));
  rank_kept(s, logits);
  std::sort(s.ranks.begin(), s.ranks.end());
  for (size_t i = 0; i < s.ranks.size(); ++i) {
    const int32_t token = token_of(s.ranks[i]);
    drawn.top_tokens[row * kMaxLogprobs + i] = token;
    drawn.top_logprobs[row * kMaxLogprobs + i] = static_cast<float>(logits[token] - log_sum);
  }
}

}  // namespace kt
