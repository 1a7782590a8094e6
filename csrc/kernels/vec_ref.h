// The vector vocabulary in plain C++: 16 lanes, every operation defined lane by lane. The other vec_*.h have the same
// names and, but for dot_bf16, the same results bit for bit; this one is their specification.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kt {
namespace {

constexpr int kLanes = 16;
constexpr bool kHasDotBf16 = false;
constexpr bool kShortSums = false;  // whether byte products are summed in 16 bits as long as they fit
constexpr int kTileRows = 4;       // rows of a tile of the integer product
constexpr int kTileRowsFloat = 2;  // the same for float products, which keep two sums for each output
constexpr int kBlockPanels = 3, kBlockRows = 4;  // of a tile of the integer product of weights unpacked in memory
constexpr int kBlockMinRows = 96;           // from so many rows on weights are unpacked in memory
constexpr int64_t kBlockChunkBytes = 0;     // of activations of a block, for the rows that use it in one go; 0: for all rows
constexpr bool kLeadsByLines = false;       // whether one or two rows prefetch each line of weights

struct Floats {
  float v[kLanes];
};
struct Ints {
  int32_t v[kLanes];
};
// 64 bytes: four for each lane.
struct Bytes {
  uint8_t v[4 * kLanes];
};

template <class Out, class Fn>
inline Out lanes(Fn fn) {
  Out out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = fn(i);
  return out;
}

// ---- Floats
inline Floats set1(float x) {
  return lanes<Floats>([&](int) { return x; });
}
inline Floats load(const float* p) {
  return lanes<Floats>([&](int i) { return p[i]; });
}
// The first n lanes, the others 0; only those are touched in memory. n in [0, 16].
inline Floats load_n(const float* p, int n) {
  return lanes<Floats>([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, Floats a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
inline void store_n(float* p, Floats a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
inline Floats operator+(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats operator-(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats operator*(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats operator/(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) {
  return lanes<Floats>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
// c - a * b, rounded once.
inline Floats fnma(Floats a, Floats b, Floats c) {
  return lanes<Floats>([&](int i) { return __builtin_fmaf(-a.v[i], b.v[i], c.v[i]); });
}
// The second operand where either is NaN, as x86 has it.
inline Floats min(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats max(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// a < b ? x : y; y where either is NaN.
inline Floats select_less(Floats a, Floats b, Floats x, Floats y) {
  return lanes<Floats>([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
// Bit i: a < b in lane i.
inline uint32_t which_less(Floats a, Floats b) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return bits;
}
// Halves added together until one is left: the one order of every horizontal sum.
inline float hsum(Floats a) {
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] = a.v[i] + a.v[i + w];
  return a.v[0];
}
// Largest lane; for lanes without NaN.
inline float hmax(Floats a) {
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] = a.v[i] > a.v[i + w] ? a.v[i] : a.v[i + w];
  return a.v[0];
}
inline Floats load_f16(const uint16_t* p) {
  return lanes<Floats>([&](int i) {
    _Float16 h;
    __builtin_memcpy(&h, p + i, sizeof h);
    return static_cast<float>(h);
  });
}
// Rounds to nearest even; too large becomes infinity.
inline void store_f16(uint16_t* p, Floats a) {
  for (int i = 0; i < kLanes; ++i) {
    const _Float16 h = static_cast<_Float16>(a.v[i]);
    __builtin_memcpy(p + i, &h, sizeof h);
  }
}

// ---- Ints; arithmetic wraps.
inline int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
inline uint32_t bits(int32_t x) { return static_cast<uint32_t>(x); }
inline Ints set1_int(int32_t x) {
  return lanes<Ints>([&](int) { return x; });
}
inline Ints load_ints(const void* p) {
  Ints out;
  __builtin_memcpy(out.v, p, sizeof out.v);
  return out;
}
inline void store_ints(int32_t* p, Ints a) { __builtin_memcpy(p, a.v, sizeof a.v); }
inline Ints load_u8(const uint8_t* p) {
  return lanes<Ints>([&](int i) { return static_cast<int32_t>(p[i]); });
}
inline Ints load_i8(const uint8_t* p) {
  return lanes<Ints>([&](int i) { return static_cast<int32_t>(static_cast<int8_t>(p[i])); });
}
// Clamped to [-128, 127].
inline void store_i8(int8_t* p, Ints a) {
  for (int i = 0; i < kLanes; ++i)
    p[i] = static_cast<int8_t>(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
}
inline Ints operator+(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return wrap(bits(a.v[i]) + bits(b.v[i])); });
}
inline Ints operator-(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return wrap(bits(a.v[i]) - bits(b.v[i])); });
}
inline Ints operator&(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] & b.v[i]; });
}
inline Ints operator|(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] | b.v[i]; });
}
inline Ints operator^(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] ^ b.v[i]; });
}
// table[index] in each lane.
inline Ints gather(const uint32_t* table, Ints index) {
  return lanes<Ints>([&](int i) { return wrap(table[index.v[i]]); });
}
template <int N>
inline Ints shift_left(Ints a) {
  return lanes<Ints>([&](int i) { return wrap(bits(a.v[i]) << N); });
}
// Fills with zeros.
template <int N>
inline Ints shift_right(Ints a) {
  return lanes<Ints>([&](int i) { return wrap(bits(a.v[i]) >> N); });
}
inline Ints shift_right(Ints a, int n) {
  return lanes<Ints>([&](int i) { return wrap(bits(a.v[i]) >> n); });
}
inline Ints max(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// Of each four neighbours the largest, in all four.
inline Ints max_of_four(Ints a) {
  return lanes<Ints>([&](int i) {
    int32_t m = a.v[i / 4 * 4];
    for (int j = i / 4 * 4 + 1; j < i / 4 * 4 + 4; ++j) m = a.v[j] > m ? a.v[j] : m;
    return m;
  });
}
struct TwoLargest {
  int32_t first, second;
};
// Of two vectors that have the same number in each four neighbours, and no number twice else: the two largest numbers.
inline TwoLargest two_largest(Ints a, Ints b) {
  TwoLargest out{INT32_MIN, INT32_MIN};
  for (int i = 0; i < 2 * kLanes; i += 4) {
    const int32_t x = i < kLanes ? a.v[i] : b.v[i - kLanes];
    if (x > out.first) {
      out = {x, out.first};
    } else if (x > out.second) {
      out.second = x;
    }
  }
  return out;
}
inline int32_t hsum(Ints a) {
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += bits(a.v[i]);
  return wrap(sum);
}
inline int32_t hmax(Ints a) {
  int32_t m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline Floats to_floats(Ints a) {
  return lanes<Floats>([&](int i) { return static_cast<float>(a.v[i]); });
}
// To the nearest integer, ties to even; INT32_MIN for NaN and what does not fit.
inline Ints round_to_ints(Floats a) {
  return lanes<Ints>([&](int i) {
    const bool fits = a.v[i] >= -2147483648.0f && a.v[i] < 2147483648.0f;
    return fits ? static_cast<int32_t>(__builtin_rintf(a.v[i])) : INT32_MIN;
  });
}
inline Floats as_floats(Ints a) {
  Floats out;
  __builtin_memcpy(out.v, a.v, sizeof out.v);
  return out;
}
inline Ints as_ints(Floats a) {
  Ints out;
  __builtin_memcpy(out.v, a.v, sizeof out.v);
  return out;
}

// ---- Bytes
template <class Fn>
inline Bytes byte_lanes(Fn fn) {
  Bytes out;
  for (int i = 0; i < 4 * kLanes; ++i) out.v[i] = static_cast<uint8_t>(fn(i));
  return out;
}
// The four bytes of each lane, lowest first.
inline Bytes as_bytes(Ints a) {
  Bytes out;
  __builtin_memcpy(out.v, a.v, sizeof out.v);
  return out;
}
inline Bytes load_bytes(const uint8_t* p) {
  return byte_lanes([&](int i) { return p[i]; });
}
inline void store_bytes(uint8_t* p, Bytes a) { __builtin_memcpy(p, a.v, sizeof a.v); }
// (a >> Shift) & Mask in each byte.
template <int Shift, int Mask>
inline Bytes field(Bytes a) {
  return byte_lanes([&](int i) { return (a.v[i] >> Shift) & Mask; });
}
// The same with a shift to the left.
template <int Shift, int Mask>
inline Bytes field_left(Bytes a) {
  return byte_lanes([&](int i) { return (a.v[i] << Shift) & Mask; });
}
inline Bytes operator|(Bytes a, Bytes b) {
  return byte_lanes([&](int i) { return a.v[i] | b.v[i]; });
}
inline Bytes operator-(Bytes a, Bytes b) {
  return byte_lanes([&](int i) { return a.v[i] - b.v[i]; });
}
// a + N in each byte.
template <int N>
inline Bytes add_bytes(Bytes a) {
  return byte_lanes([&](int i) { return a.v[i] + N; });
}
// table[a], for bytes below 16.
inline Bytes lookup16(const uint8_t* table, Bytes a) {
  return byte_lanes([&](int i) { return table[a.v[i] & 15]; });
}
// The same four signed bytes for each lane.
inline Bytes broadcast4(const int8_t* p) {
  return byte_lanes([&](int i) { return static_cast<uint8_t>(p[i % 4]); });
}
// Nothing, but the compiler may not know what is in `a` afterwards.
inline void keep(Bytes& a) { __asm__ volatile("" : "+m"(a)); }
// acc + sum of the lane's four products w * a; w unsigned and at most 127, a signed and not -128.
inline Ints dot_u7(Ints acc, Bytes w, Bytes a) {
  return lanes<Ints>([&](int i) {
    int32_t sum = acc.v[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += static_cast<int32_t>(w.v[j]) * static_cast<int8_t>(a.v[j]);
    return sum;
  });
}
// The same in steps, while sums of 16 bits hold it: for two neighbours each the sum of their products, and those of a
// lane's two pairs added to its 32 bits.
struct Shorts {
  int16_t v[2 * kLanes];
};
inline Shorts products_of_pairs(Bytes w, Bytes a) {
  Shorts out;
  for (int i = 0; i < 2 * kLanes; ++i)
    out.v[i] = static_cast<int16_t>(w.v[2 * i] * static_cast<int8_t>(a.v[2 * i]) +
                                    w.v[2 * i + 1] * static_cast<int8_t>(a.v[2 * i + 1]));
  return out;
}
inline Shorts operator+(Shorts a, Shorts b) {
  for (int i = 0; i < 2 * kLanes; ++i) a.v[i] = static_cast<int16_t>(a.v[i] + b.v[i]);
  return a;
}
inline Ints add_pairs(Ints acc, Shorts a) {
  return lanes<Ints>([&](int i) { return acc.v[i] + a.v[2 * i] + a.v[2 * i + 1]; });
}
// The same for weights stored with 128 added: the sum of (w - 128) * a, provided that the chain began with
// start_biased128(-(sum of all its a)).
inline Ints start_biased128(int32_t) { return set1_int(0); }
inline Ints dot_biased128(Ints acc, Bytes w, Bytes a) {
  return lanes<Ints>([&](int i) {
    int32_t sum = acc.v[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) {
      sum += (static_cast<int32_t>(w.v[j]) - 128) * static_cast<int8_t>(a.v[j]);
    }
    return sum;
  });
}

}  // namespace
}  // namespace kt
