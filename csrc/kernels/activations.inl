// What rows of a product's input look like once they are presented (quantize.inl writes them).
#pragma once

namespace kt {
namespace {

// 32 elements of an int8 row: x is about scale * q. The sums pay for the biases and minimums of weights; the
// integer ones are negative because an accumulator starts at -bias * sum.
struct ActivationGroup {
  float scale;
  float scaled_sum;          // scale * sum of q
  int32_t negative_sum;      // -(sum of q)
  int32_t negative_half[2];  // the same of the first 16 and of the others
  int8_t q[kGroup];
};
static_assert(sizeof(ActivationGroup) == 52);

// Where one quad (four neighbours) stands far out of the group, a scale that fits it would leave little of the others.
// kInt8FarOut has the scale fit the others there, and the quad is 128 * high + q. The integer sums are of q alone, which
// is all that the product of groups sees; scaled_sum is of everything.
struct FarOutQuad {
  int32_t group, quad;
  int8_t high[4];
};

// After a row's groups: its far-out quads in ascending order, one of a group at most.
struct FarOutList {
  int32_t count;
  FarOutQuad quads[];
};

}  // namespace
}  // namespace kt
