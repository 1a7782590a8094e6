#include "ops/rows.h"

#include <cmath>
#include <cstring>
#include <utility>

namespace kt {

std::vector<float> vector_of(const Weight& weight) {
  std::vector<float> values(weight.cols());
  weight.row(0, values.data());
  return values;
}

RowFunction make_embed(const Model& model, const Values& values, const op::Embed& op) {
  return [&weight = *model.weights[op.table], out = values.data[op.out], width = values.widths[op.out],
          scale = op.scale](const Step& step, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = out + r * width;
      weight.row(step.batch.tokens[r], row);
      if (scale != 1.0f)
        for (int64_t i = 0; i < width; ++i) row[i] *= scale;
    }
  };
}

RowFunction make_rms_norm(const KernelTable& table, const Model& model, const Values& values, const op::RmsNorm& op) {
  return [norm = table.rms_norm, weight = vector_of(*model.weights[op.weight]), x = values.data[op.x],
          out = values.data[op.out], width = values.widths[op.x], group = op.group,
          eps = op.eps](const Step&, int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < end * width; i += group) norm(x + i, weight.data(), group, eps, out + i);
  };
}

namespace {

// Of few elements in a step: the same bits for every table without being in them.
RowFunction make_sigmoid(const Values& values, const op::Gated& op) {
  return [gate = values.data[op.gate], up = values.data[op.up], out = values.data[op.out], width = values.widths[op.up],
          gates = values.widths[op.gate]](const Step&, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < width; ++i) {
        const float g = gate[r * gates + (gates == 1 ? 0 : i)];
        out[r * width + i] = up[r * width + i] / (1.0f + std::exp(-g));
      }
    }
  };
}

}  // namespace

RowFunction make_gated(const KernelTable& table, const Values& values, const op::Gated& op) {
  if (op.act == op::Act::kSigmoid) return make_sigmoid(values, op);
  return [mul = op.act == op::Act::kSilu ? table.silu_mul : table.gelu_tanh_mul, gate = values.data[op.gate],
          up = values.data[op.up], out = values.data[op.out],
          width = values.widths[op.out]](const Step&, int64_t begin, int64_t end) {
    const int64_t at = begin * width;
    mul(gate + at, up + at, (end - begin) * width, out + at);
  };
}

RowFunction make_add(const KernelTable& table, const Values& values, const op::Add& op) {
  return [add = table.add, a = values.data[op.a], b = values.data[op.b], out = values.data[op.out],
          width = values.widths[op.out]](const Step&, int64_t begin, int64_t end) {
    const int64_t at = begin * width;
    add(a + at, b + at, (end - begin) * width, out + at);
  };
}

RowFunction make_gather(const Values& values, const op::GatherRows& op) {
  return [x = values.data[op.x], out = values.data[op.out], width = values.widths[op.out]](const Step& step, int64_t begin,
                                                                                           int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      std::memcpy(out + r * width, x + step.batch.logit_rows[r] * width, width * sizeof(float));
  };
}

RowFunction make_position_scale(const Values& values, const op::PositionScale& op) {
  return [x = values.data[op.x], width = values.widths[op.x], span = op.span,
          scale = op.scale](const Step& step, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const double spans = std::floor(static_cast<double>(step.positions[r] + 1) / static_cast<double>(span));
      const float factor = static_cast<float>(1.0 + scale * std::log1p(spans));
      for (int64_t i = r * width; i < (r + 1) * width; ++i) x[i] *= factor;
    }
  };
}

RowFunction make_rope_angles(std::vector<float> inv_freq, float scale, float* cos_sin) {
  return [inv_freq = std::move(inv_freq), scale, cos_sin](const Step& step, int64_t begin, int64_t end) {
    const size_t pairs = inv_freq.size();
    for (int64_t r = begin; r < end; ++r) {
      float* cosines = cos_sin + r * 2 * pairs;
      for (size_t i = 0; i < pairs; ++i) {
        // In double: at position 1e6 the angle in float32 would be off by a sixteenth of a turn.
        const double angle = static_cast<double>(step.positions[r]) * inv_freq[i];
        cosines[i] = static_cast<float>(std::cos(angle) * scale);
        cosines[pairs + i] = static_cast<float>(std::sin(angle) * scale);
      }
    }
  };
}

RowFunction make_rope(const KernelTable& table, const Values& values, const op::Rope& op, int64_t pairs,
                      const float* cos_sin) {
  return [rope = table.rope, x = values.data[op.x] + op.offset, width = values.widths[op.x], heads = op.heads,
          head_dim = op.head_dim, interleaved = op.interleaved, pairs,
          cos_sin](const Step&, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      rope(x + r * width, heads, head_dim, cos_sin + r * 2 * pairs, pairs, interleaved);
  };
}

}  // namespace kt
