// How the integers of a group are packed: 16 outputs by 32 elements, as eight quads. A quad is one vector: for each of
// the 16 outputs the four elements 4q .. 4q + 3, one byte each, which is what a byte dot product takes. Widths below
// eight bits are split in planes of 4, 2 and 1 bits, in which several quads share the bytes of one vector.
#pragma once

namespace kt {
namespace {

constexpr int kGroup = 32;  // elements that share one activation scale
constexpr int kQuadBytes = 4 * kPanelRows;
using QuadArray = uint8_t[kGroup / 4][kQuadBytes];

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

// fn(Index<0>()), ..., fn(Index<N - 1>())
template <int N, int I = 0, class Fn>
[[gnu::always_inline]] inline void unroll(const Fn& fn) {
  if constexpr (I < N) {
    fn(Index<I>());
    unroll<N, I + 1>(fn);
  }
}

// One plane: bits [From, From + Bits) of every element, 8 / Bits quads in each vector, the first in the low bits.
template <int From, int Bits>
struct Plane {
  static constexpr int kPerVector = 8 / Bits;
  static constexpr int kBytes = kGroup / 4 / kPerVector * kQuadBytes;
  static constexpr int kMask = ((1 << Bits) - 1) << From;
  static constexpr int kMost = (1 << (From + Bits)) - 1;  // the largest integer

  static void pack(const QuadArray& quads, uint8_t* out) {
    for (int v = 0; v < kGroup / 4 / kPerVector; ++v) {
      for (int i = 0; i < kQuadBytes; ++i) {
        unsigned byte = 0;
        for (int j = 0; j < kPerVector; ++j) {
          byte |= ((quads[v * kPerVector + j][i] & unsigned{kMask}) >> From) << (j * Bits);
        }
        out[v * kQuadBytes + i] = static_cast<uint8_t>(byte);
      }
    }
  }

  // The plane's bits of quad Q, where they belong in a byte.
  template <int Q>
  static Bytes quad(const uint8_t* in) {
    const Bytes v = load_bytes(in + Q / kPerVector * kQuadBytes);
    constexpr int kShift = (Q % kPerVector) * Bits - From;
    if constexpr (Bits == 8) {
      return v;
    } else if constexpr (kShift >= 0) {
      return field<kShift, kMask>(v);
    } else {
      return field_left<-kShift, kMask>(v);
    }
  }
};

// Elements of Low + High bits in two planes.
template <int Low, int High>
struct TwoPlanes {
  using A = Plane<0, Low>;
  using B = Plane<Low, High>;
  static constexpr int kBytes = A::kBytes + B::kBytes;
  static constexpr int kMost = B::kMost;
  static void pack(const QuadArray& quads, uint8_t* out) {
    A::pack(quads, out);
    B::pack(quads, out + A::kBytes);
  }
  template <int Q>
  static Bytes quad(const uint8_t* in) {
    return A::template quad<Q>(in) | B::template quad<Q>(in + A::kBytes);
  }
};

using Quads2 = Plane<0, 2>;
using Quads3 = TwoPlanes<2, 1>;
using Quads4 = Plane<0, 4>;
using Quads5 = TwoPlanes<4, 1>;
using Quads6 = TwoPlanes<4, 2>;
using Quads8 = Plane<0, 8>;

}  // namespace
}  // namespace kt
