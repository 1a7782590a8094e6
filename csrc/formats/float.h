// F32, F16 and BF16 weights. A panel is a stream of pairs: elements 2p and 2p + 1 of its 16 outputs; a last odd element
// is paired with zeros.
#pragma once

namespace kt {
namespace {

// Elements one after the other, 16 outputs each.
template <class Element>
struct ByElement {
  static constexpr int kFileBytes = sizeof(Element), kPairBytes = 2 * kPanelRows * kFileBytes;
  static int64_t offset(int64_t k, int lane) { return (k * kPanelRows + lane) * kFileBytes; }
};

struct F32 : ByElement<float> {
  static constexpr Activation kActivation = Activation::kF32;
  static void pair(const uint8_t* p, Floats& even, Floats& odd) {
    even = load(reinterpret_cast<const float*>(p));
    odd = load(reinterpret_cast<const float*>(p) + kPanelRows);
  }
};

struct F16 : ByElement<uint16_t> {
  static constexpr Activation kActivation = Activation::kF32;
  static void pair(const uint8_t* p, Floats& even, Floats& odd) {
    even = load_f16(reinterpret_cast<const uint16_t*>(p));
    odd = load_f16(reinterpret_cast<const uint16_t*>(p) + kPanelRows);
  }
};

// Each output's pair is one 32-bit lane, as a bfloat16 dot product takes it; to widen is one instruction for each half.
struct BF16 {
  static constexpr Activation kActivation = kHasDotBf16 ? Activation::kBF16 : Activation::kF32;
  static constexpr int kFileBytes = 2, kPairBytes = 4 * kPanelRows;
  static int64_t offset(int64_t k, int lane) { return (k / 2 * kPanelRows + lane) * 4 + k % 2 * 2; }
  static Ints bf16_pair(const uint8_t* p) { return load_ints(p); }
  static void pair(const uint8_t* p, Floats& even, Floats& odd) {
    const Ints both = load_ints(p);
    even = as_floats(shift_left<16>(both));
    odd = as_floats(both & set1_int(-65536));
  }
};

}  // namespace
}  // namespace kt
