// What sequences carry from token to token beside their KV: short convolutions and the gated delta rule.
#pragma once
#include <cstdint>

#include "cpu/memory.h"
#include "ops/step.h"

namespace kt {

// The states of all slots, float32. One state is contiguous: of each layer the tail of its convolution [tail][conv], then
// its heads [heads][k_dim][v_dim].
class StatePool {
 public:
  StatePool() = default;
  // As KvPool: a page costs memory when it is first written. std::invalid_argument, std::bad_alloc.
  StatePool(const StateShape& shape, int64_t slots);

  int64_t slots() const { return slots_; }
  float* tail(int64_t slot, int64_t layer) const { return memory_.as<float>() + slot * floats_ + layer * layer_floats_; }
  float* heads(int64_t slot, int64_t layer) const { return tail(slot, layer) + tail_floats_; }

  // std::invalid_argument when there is no such slot.
  void copy(int64_t source, int64_t target) const;

 private:
  Mapping memory_;
  int64_t slots_ = 0, tail_floats_ = 0, layer_floats_ = 0, floats_ = 0;
};

WholeFunction make_short_conv(const KernelTable& table, ThreadPool& pool, const Model& model, const Values& values,
                              const StatePool& states, const op::ShortConv& op);

// Divides queries and keys by their lengths, and makes of a and b the factors of the old state and of the correction.
RowFunction make_delta_inputs(const KernelTable& table, const Model& model, const Values& values, const op::DeltaRule& op);
WholeFunction make_delta_rule(const KernelTable& table, ThreadPool& pool, const Values& values, const StatePool& states,
                              const op::DeltaRule& op);

}  // namespace kt
