// A short convolution, and the gated delta rule: what a sequence carries from token to token.
#pragma once

namespace kt {
namespace {

void short_conv(const float* const* rows, const float* weights, int64_t stride, int64_t taps, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    Floats sum = load_n(rows[0] + i, lanes) * load_n(weights + i, lanes);
    for (int64_t j = 1; j < taps; ++j) sum = fma(load_n(rows[j] + i, lanes), load_n(weights + j * stride + i, lanes), sum);
    store_n(y + i, silu(sum), lanes);
  }
}

// Columns of the state that go through all tokens before the next ones: k_dim rows of them stay in the first cache.
constexpr int kDeltaVectors = 2;

// A column of the state needs no other, so work is split by columns; along k_dim the order is fixed. Per token a row of
// the state is read and written once: what the token adds is followed at once by the next token's decay and its product
// with the next key, which are the same roundings as if the row had gone to memory between them.
template <int Vectors, bool Whole>
inline void delta_columns(const DeltaTask& t, int64_t column, int lanes) {
  const auto read = [&](const float* p, int i) { return Whole ? load(p + i * kLanes) : load_n(p, lanes); };
  const auto write = [&](float* p, int i, Floats a) { Whole ? store(p + i * kLanes, a) : store_n(p, a, lanes); };
  Floats seen[Vectors], change[Vectors], out[Vectors];
  for (int i = 0; i < Vectors; ++i) seen[i] = set1(0.0f);
  for (int64_t r = 0; r < t.k_dim; ++r) {
    float* row = t.state + r * t.v_dim + column;
    const Floats key = set1(t.k[r]), decay = set1(t.decay[0]);
    for (int i = 0; i < Vectors; ++i) {
      const Floats s = read(row, i) * decay;
      seen[i] = fma(s, key, seen[i]);
      write(row, i, s);
    }
  }
  for (int64_t n = 0; n < t.tokens; ++n) {
    const float *q = t.q + n * t.stride, *k = t.k + n * t.stride, *v = t.v + n * t.stride + column;
    const Floats beta = set1(t.beta[n * t.gate_stride]);
    for (int i = 0; i < Vectors; ++i) {
      change[i] = (read(v, i) - seen[i]) * beta;
      seen[i] = out[i] = set1(0.0f);
    }
    if (n + 1 == t.tokens) {
      for (int64_t r = 0; r < t.k_dim; ++r) {
        float* row = t.state + r * t.v_dim + column;
        const Floats key = set1(k[r]), query = set1(q[r]);
        for (int i = 0; i < Vectors; ++i) {
          const Floats s = fma(key, change[i], read(row, i));
          out[i] = fma(s, query, out[i]);
          write(row, i, s);
        }
      }
    } else {
      const float* next_key = k + t.stride;
      const Floats decay = set1(t.decay[(n + 1) * t.gate_stride]);
      for (int64_t r = 0; r < t.k_dim; ++r) {
        float* row = t.state + r * t.v_dim + column;
        const Floats key = set1(k[r]), query = set1(q[r]), next = set1(next_key[r]);
        for (int i = 0; i < Vectors; ++i) {
          const Floats s = fma(key, change[i], read(row, i));
          out[i] = fma(s, query, out[i]);
          const Floats decayed = s * decay;
          seen[i] = fma(decayed, next, seen[i]);
          write(row, i, decayed);
        }
      }
    }
    for (int i = 0; i < Vectors; ++i) write(t.out + n * t.out_stride + column, i, out[i]);
  }
}

void delta_rule(const DeltaTask& t) {
  if (t.tokens == 0) return;
  constexpr int64_t kColumns = kDeltaVectors * kLanes;
  int64_t column = 0;
  for (; column + kColumns <= t.v_dim; column += kColumns) delta_columns<kDeltaVectors, true>(t, column, 0);
  for (; column < t.v_dim; column += kLanes) {
    const int64_t rest = t.v_dim - column;
    delta_columns<1, false>(t, column, static_cast<int>(rest < kLanes ? rest : kLanes));
  }
}

}  // namespace
}  // namespace kt
