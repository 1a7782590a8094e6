// Operations on rows of float32. Each is one pass; an output may be one of its inputs.
#pragma once

namespace kt {
namespace {

// y[i] = fn(a[i], b[i])
template <class Fn>
inline void map(const float* a, const float* b, int64_t n, float* y, Fn fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, fn(load(a + i), load(b + i)));
  const int rest = static_cast<int>(n - i);
  if (rest > 0) store_n(y + i, fn(load_n(a + i, rest), load_n(b + i, rest)), rest);
}

void add(const float* a, const float* b, int64_t n, float* y) {
  map(a, b, n, y, [](Floats u, Floats v) { return u + v; });
}

void silu_mul(const float* gate, const float* up, int64_t n, float* y) {
  map(gate, up, n, y, [](Floats g, Floats u) { return silu(g) * u; });
}

void gelu_tanh_mul(const float* gate, const float* up, int64_t n, float* y) {
  map(gate, up, n, y, [](Floats g, Floats u) { return gelu_tanh(g) * u; });
}

void relu_mul(const float* gate, const float* up, int64_t n, float* y) {
  map(gate, up, n, y, [](Floats g, Floats u) { return max(set1(0.0f), g) * u; });
}

void swiglu_oai(const float* g, const float* u, int64_t n, float alpha, float limit, float* y) {
  map(g, u, n, y, [alpha, limit](Floats g, Floats u) {
    g = finite_below(min(set1(limit), g));
    u = max(set1(-limit), min(set1(limit), u));
    return gate(g, set1(alpha) * g) * (u + set1(1.0f));
  });
}

// cap * tanh(x / cap)
void softcap(float* x, int64_t n, float cap) {
  map(x, x, n, x, [cap](Floats v, Floats) { return set1(cap) * tanh(v / set1(cap)); });
}

void weighted_sum(const float* const* rows, const float* weights, int64_t count, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    Floats sum = load_n(rows[0] + i, lanes) * set1(weights[0]);
    for (int64_t k = 1; k < count; ++k) sum = fma(load_n(rows[k] + i, lanes), set1(weights[k]), sum);
    store_n(y + i, sum, lanes);
  }
}

// Four sums hide the latency of the fused multiply-add; their order is part of the result.
float sum_of_squares(const float* x, int64_t n) {
  Floats s[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const Floats v = load(x + i + j * kLanes);
      s[j] = fma(v, v, s[j]);
    }
  }
  for (int j = 0; i < n; i += kLanes, ++j) {
    const Floats v = load_n(x + i, n - i < kLanes ? static_cast<int>(n - i) : kLanes);
    s[j] = fma(v, v, s[j]);
  }
  return hsum((s[0] + s[1]) + (s[2] + s[3]));
}

// y = x / sqrt(mean(x^2) + eps) * weight
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  const float mean = sum_of_squares(x, n) / static_cast<float>(n);
  const Floats inverse = set1(1.0f / __builtin_sqrtf(mean + eps));
  map(x, weight, n, y, [inverse](Floats v, Floats w) { return (v * inverse) * w; });
}

// Rotates pairs by angles whose cosines are cos_sin[0, pairs) and sines cos_sin[pairs, 2 pairs).
void rope_halves(float* x, const float* cosine, const float* sine, int64_t pairs) {
  float* y = x + pairs;
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    const Floats a = load(x + i), b = load(y + i), c = load(cosine + i), s = load(sine + i);
    store(x + i, fnma(b, s, a * c));
    store(y + i, fma(a, s, b * c));
  }
  const int rest = static_cast<int>(pairs - i);
  if (rest > 0) {
    const Floats a = load_n(x + i, rest), b = load_n(y + i, rest);
    const Floats c = load_n(cosine + i, rest), s = load_n(sine + i, rest);
    store_n(x + i, fnma(b, s, a * c), rest);
    store_n(y + i, fma(a, s, b * c), rest);
  }
}

void rope_interleaved(float* x, const float* cosine, const float* sine, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = __builtin_fmaf(-b, sine[i], a * cosine[i]);
    x[2 * i + 1] = __builtin_fmaf(a, sine[i], b * cosine[i]);
  }
}

void rope(float* x, int64_t heads, int64_t head_dim, const float* cos_sin, int64_t pairs, bool interleaved) {
  for (int64_t h = 0; h < heads; ++h) {
    if (interleaved) {
      rope_interleaved(x + h * head_dim, cos_sin, cos_sin + pairs, pairs);
    } else {
      rope_halves(x + h * head_dim, cos_sin, cos_sin + pairs, pairs);
    }
  }
}

}  // namespace
}  // namespace kt
