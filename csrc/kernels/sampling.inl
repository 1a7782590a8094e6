// Passes over a row of logits, for the sampler.
#pragma once

namespace kt {
namespace {

constexpr int64_t kRun = kSampleRun;

// maxima[i] = largest of run i; false when any value is NaN or infinite.
bool scan_logits(const float* x, int64_t n, float* maxima) {
  Floats bad = set1(0.0f);
  for (int64_t run = 0; run * kRun < n; ++run) {
    Floats top = set1(-__builtin_inff());
    const int64_t end = (run + 1) * kRun < n ? (run + 1) * kRun : n;
    int64_t i = run * kRun;
    for (; i + kLanes <= end; i += kLanes) {
      const Floats v = load(x + i);
      top = max(v, top);
      bad = bad + (v - v);  // 0 for finite numbers, else NaN
    }
    float rest = hmax(top), odd = 0.0f;
    for (; i < end; ++i) {
      rest = x[i] > rest ? x[i] : rest;
      odd += x[i] - x[i];
    }
    maxima[run] = rest;
    bad = bad + set1(odd);
  }
  return hsum(bad) == 0.0f;
}

// w[i] = exp((x[i] - maximum) / temperature); sums[i] = sum of run i of w.
void exp_logits(const float* x, int64_t n, float maximum, float temperature, float* w, float* sums) {
  for (int64_t run = 0; run * kRun < n; ++run) {
    Floats sum = set1(0.0f);
    const int64_t end = (run + 1) * kRun < n ? (run + 1) * kRun : n;
    for (int64_t i = run * kRun; i < end; i += kLanes) {
      const int count = static_cast<int>(end - i < kLanes ? end - i : kLanes);
      const Floats e = exp((load_n(x + i, count) - set1(maximum)) / set1(temperature));
      store_n(w + i, e, count);
      sum = sum + (count == kLanes ? e : load_n(w + i, count));
    }
    sums[run] = hsum(sum);
  }
}

}  // namespace
}  // namespace kt
