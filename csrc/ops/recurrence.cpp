#include "ops/recurrence.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "ops/rows.h"

namespace kt {
namespace {

constexpr int64_t kConvColumns = 256;  // of one unit of work
constexpr float kLengthEps = 1e-6f;

// The tokens of one sequence in this step, in two parts: between them a copy of the state is kept.
struct Run {
  int64_t begin, first, tokens;  // rows [begin, begin + tokens), of which `first` come before the copy
  bool fresh;                    // the state is zeros
  int64_t slot, keep;            // keep is -1 when no copy is wanted; then first is 0
};

Run run_of(const Batch& b, int64_t s) {
  Run run{b.starts[s], 0, b.starts[s + 1] - b.starts[s], b.context[s] == 0, b.slots[s], b.keep_slots[s]};
  if (run.keep >= 0) run.first = b.keep_at[s] - b.context[s];
  return run;
}

}  // namespace

StatePool::StatePool(const StateShape& shape, int64_t slots)
    : slots_(slots),
      tail_floats_(shape.tail * shape.conv),
      layer_floats_(tail_floats_ + shape.heads * shape.k_dim * shape.v_dim) {
  int64_t bytes = 0;
  if (slots <= 0) throw std::invalid_argument("state_slots: must be positive");
  if (__builtin_mul_overflow(shape.layers, layer_floats_, &floats_) ||
      __builtin_mul_overflow(floats_, static_cast<int64_t>(sizeof(float)), &bytes) ||
      __builtin_mul_overflow(bytes, slots, &bytes))
    throw std::invalid_argument("state_slots: the states do not fit the address space");
  memory_ = Mapping(static_cast<size_t>(bytes));
}

void StatePool::copy(int64_t source, int64_t target) const {
  for (const int64_t slot : {source, target})
    if (slot < 0 || slot >= slots_) throw std::invalid_argument("state: there is no such slot");
  if (source != target) std::memcpy(tail(target, 0), tail(source, 0), floats_ * sizeof(float));
}

namespace {

class ShortConv {
 public:
  ShortConv(const KernelTable& table, const Model& model, const Values& values, const StatePool& states,
            const op::ShortConv& op)
      : conv_(table.short_conv), states_(states), x_(values.data[op.x]), out_(values.data[op.out]),
        width_(values.widths[op.x]), tail_(model.state.tail), layer_(op.layer), weights_((tail_ + 1) * width_),
        zeros_(kConvColumns) {
    for (int64_t j = 0; j <= tail_; ++j) model.weights[op.weight]->row(j, weights_.data() + j * width_);
  }

  int64_t units() const { return (width_ + kConvColumns - 1) / kConvColumns; }

  void run(const Run& run, int64_t unit) const {
    const int64_t column = unit * kConvColumns, n = std::min(kConvColumns, width_ - column);
    float* tail = states_.tail(run.slot, layer_) + column;
    // Token t of this step, which for t < 0 lies before it.
    const auto input = [&](int64_t t) -> const float* {
      if (t >= 0) return x_ + (run.begin + t) * width_ + column;
      return run.fresh ? zeros_.data() : tail + (tail_ + t) * width_;
    };
    const float* rows[kMaxTaps];
    for (int64_t t = 0; t < run.tokens; ++t) {
      for (int64_t j = 0; j <= tail_; ++j) rows[j] = input(t - tail_ + j);
      conv_(rows, weights_.data() + column, width_, tail_ + 1, n, out_ + (run.begin + t) * width_ + column);
    }
    // What lies before this step is read from the tail itself, always below what is written.
    const auto leave = [&](float* to, int64_t tokens) {
      for (int64_t j = 0; j < tail_; ++j) std::memmove(to + j * width_, input(tokens - tail_ + j), n * sizeof(float));
    };
    if (run.keep >= 0) leave(states_.tail(run.keep, layer_) + column, run.first);
    leave(tail, run.tokens);
  }

 private:
  decltype(KernelTable::short_conv) conv_;
  const StatePool& states_;
  const float* x_;
  float* out_;
  int64_t width_, tail_, layer_;
  std::vector<float> weights_, zeros_;
};

}  // namespace

WholeFunction make_short_conv(const KernelTable& table, ThreadPool& pool, const Model& model, const Values& values,
                              const StatePool& states, const op::ShortConv& op) {
  return [conv = ShortConv(table, model, values, states, op), &pool](const Step& step) {
    const int64_t units = conv.units();
    pool.parallel_for(step.batch.sequences() * units, [&](int64_t i, int) {
      if (const Run run = run_of(step.batch, i / units); run.tokens > 0) conv.run(run, i % units);
    });
  };
}

RowFunction make_delta_inputs(const KernelTable& table, const Model& model, const Values& values, const op::DeltaRule& op) {
  // x / sqrt(sum + eps) is the norm x / sqrt(sum / n + eps / n) with a weight of 1 / sqrt(n).
  const float n = static_cast<float>(op.k_dim);
  return [norm = table.rms_norm, query(std::vector<float>(op.k_dim, 1.0f / n)),
          key(std::vector<float>(op.k_dim, 1.0f / std::sqrt(n))), decay = vector_of(*model.weights[op.decay]),
          bias = vector_of(*model.weights[op.bias]), qkv = values.data[op.qkv], a = values.data[op.a],
          b = values.data[op.b], width = values.widths[op.qkv], k_heads = op.k_heads, v_heads = op.v_heads,
          k_dim = op.k_dim, eps = kLengthEps / n](const Step&, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t h = 0; h < 2 * k_heads; ++h) {
        float* x = qkv + r * width + h * k_dim;
        norm(x, h < k_heads ? query.data() : key.data(), k_dim, eps, x);
      }
      for (int64_t h = 0; h < v_heads; ++h) {
        float &gate = a[r * v_heads + h], &beta = b[r * v_heads + h];
        const float x = gate + bias[h];
        // softplus, without the overflow of e^x
        gate = std::exp(decay[h] * (std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x)))));
        beta = 1.0f / (1.0f + std::exp(-beta));
      }
    }
  };
}

WholeFunction make_delta_rule(const KernelTable& table, ThreadPool& pool, const Values& values, const StatePool& states,
                              const op::DeltaRule& op) {
  DeltaTask task{};
  task.stride = values.widths[op.qkv];
  task.gate_stride = op.v_heads;
  task.out_stride = values.widths[op.out];
  task.k_dim = op.k_dim;
  task.v_dim = op.v_dim;
  return [task, rule = table.delta_rule, &pool, &states, op, qkv = values.data[op.qkv], a = values.data[op.a],
          b = values.data[op.b], out = values.data[op.out]](const Step& step) {
    const size_t head_bytes = op.k_dim * op.v_dim * sizeof(float);
    pool.parallel_for(step.batch.sequences() * op.v_heads, [&](int64_t i, int) {
      const Run run = run_of(step.batch, i / op.v_heads);
      if (run.tokens == 0) return;
      const int64_t head = i % op.v_heads, k_head = head / (op.v_heads / op.k_heads);
      DeltaTask t = task;
      t.state = states.heads(run.slot, op.layer) + head * op.k_dim * op.v_dim;
      if (run.fresh) std::memset(t.state, 0, head_bytes);
      const auto tokens = [&](int64_t begin, int64_t end) {
        const float* row = qkv + begin * t.stride;
        t.q = row + k_head * op.k_dim;
        t.k = row + (op.k_heads + k_head) * op.k_dim;
        t.v = row + 2 * op.k_heads * op.k_dim + head * op.v_dim;
        t.decay = a + begin * op.v_heads + head;
        t.beta = b + begin * op.v_heads + head;
        t.out = out + begin * t.out_stride + head * op.v_dim;
        t.tokens = end - begin;
        rule(t);
      };
      tokens(run.begin, run.begin + run.first);
      if (run.keep >= 0)
        std::memcpy(states.heads(run.keep, op.layer) + head * op.k_dim * op.v_dim, t.state, head_bytes);
      tokens(run.begin + run.first, run.begin + run.tokens);
    });
  };
}

}  // namespace kt
