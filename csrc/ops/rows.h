// Ops that work on each row by itself.
#pragma once
#include <cstdint>

#include "ops/step.h"

namespace kt {

// The small float vector (norm, bias, frequencies) that is row 0 of a weight.
std::vector<float> vector_of(const Weight& weight);

RowFunction make_embed(const Model& model, const Values& values, const op::Embed& op);
RowFunction make_rms_norm(const KernelTable& table, const Model& model, const Values& values, const op::RmsNorm& op);
RowFunction make_gated(const KernelTable& table, const Values& values, const op::Gated& op);
RowFunction make_add(const KernelTable& table, const Values& values, const op::Add& op);
RowFunction make_gather(const Values& values, const op::GatherRows& op);
RowFunction make_position_scale(const Values& values, const op::PositionScale& op);

// Fills cos_sin, for each token of the step the `2 * pairs` floats that rope takes: scale * cos, then scale * sin of
// position * inv_freq.
RowFunction make_rope_angles(std::vector<float> inv_freq, float scale, float* cos_sin);
RowFunction make_rope(const KernelTable& table, const Values& values, const op::Rope& op, int64_t pairs,
                      const float* cos_sin);

}  // namespace kt
