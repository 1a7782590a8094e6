#include "ops/attention.h"

#include <algorithm>
#include <stdexcept>
#include <variant>

#include "ops/rows.h"

namespace kt {

KvPool::KvPool(const CacheShape& shape, int64_t blocks)
    : format_(shape.format),
      blocks_(blocks),
      kv_heads_(shape.kv_heads),
      head_bytes_(kv_head_bytes(shape.format, shape.head_dim)) {
  int64_t bytes = 0;
  if (blocks <= 0) throw std::invalid_argument("blocks: must be positive");
  if (__builtin_mul_overflow(shape.layers * shape.kv_heads, head_bytes_, &block_bytes_) ||
      __builtin_mul_overflow(block_bytes_, blocks, &bytes))
    throw std::invalid_argument("blocks: the cache does not fit the address space");
  memory_ = Mapping(static_cast<size_t>(bytes));
}

std::span<uint8_t> KvPool::block(int64_t block) const {
  if (block < 0 || block >= blocks_) throw std::invalid_argument("block: there is no such block");
  return {memory_.data() + block * block_bytes_, static_cast<size_t>(block_bytes_)};
}

RowFunction make_store_kv(const KernelTable& table, const Values& values, const KvPool& kv, const op::Attention& op) {
  return [store = table.store_kv, k = values.data[op.k], v = values.data[op.v], &kv, layer = op.layer,
          kv_heads = op.kv_heads, head_dim = op.head_dim](const Step& step, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t at = (r * kv_heads + h) * head_dim;
        store(kv.format(), k + at, v + at, head_dim, step.positions[r] % kBlockTokens,
              kv.base(layer, h) + step.token_block[r] * kv.block_bytes());
      }
    }
  };
}

AttentionMemory::AttentionMemory(const KernelTable& table, const std::vector<Op>& ops, int threads)
    : unfinished(std::make_unique<std::atomic<int64_t>[]>(threads * kSplitUnits)) {
  for (const Op& any : ops) {
    const auto* op = std::get_if<op::Attention>(&any);
    if (op == nullptr) continue;
    AttentionTask task{};
    task.rows = kQueryRows;
    task.group = op->heads / op->kv_heads;
    task.head_dim = op->head_dim;
    constexpr size_t kLine = 64 / sizeof(float);
    stride = std::max(stride, (table.attention_scratch_floats(task) + kLine - 1) / kLine * kLine);
  }
  scratch.resize(stride * threads);
}

namespace {

// A unit of attention is one kv head for one piece of query rows. They go in the order of their work, the longest
// first: what is left for the end is short.
class Attention {
 public:
  Attention(const KernelTable& table, const Model& model, const Values& values, const KvPool& kv, const op::Attention& op,
            AttentionMemory& memory)
      : table_(table), q_(values.data[op.q]), out_(values.data[op.out]), kv_(kv), op_(op), memory_(memory) {
    if (op.sinks != op::kNone) sinks_ = vector_of(*model.weights[op.sinks]);
  }

  void run(const Step& step, ThreadPool& pool) const {
    const int64_t units = static_cast<int64_t>(step.query_rows.size()) * op_.kv_heads;
    if (units < pool.threads() * kSplitUnits) return run_split(step, pool, units);
    pool.parallel_for(units, [&](int64_t unit, int thread) { table_.attention(task(step, unit), scratch(thread)); });
  }

 private:
  // Too few units to occupy the threads: the spans of each are computed apart, and whoever finishes the last merges.
  void run_split(const Step& step, ThreadPool& pool, int64_t units) const {
    auto& parts = memory_.parts;
    parts.clear();
    size_t floats = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      const AttentionTask t = task(step, unit);
      const int64_t from = first_seen(t, t.first_position);
      const int64_t first = from / kSpanTokens, last = (t.first_position + t.rows - 1) / kSpanTokens;
      memory_.unfinished[unit].store(last - first + 1, std::memory_order_relaxed);
      const size_t states = floats;
      for (int64_t span = first; span <= last; ++span) {
        parts.push_back({unit, span, states, floats});
        floats += table_.attention_state_floats(t);
      }
    }
    if (memory_.states.size() < floats) memory_.states.resize(floats);
    pool.parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t i, int thread) {
      const AttentionMemory::Part& part = parts[i];
      const AttentionTask t = task(step, part.unit);
      float* states = memory_.states.data();
      table_.attention_span(t, part.span, states + part.state, scratch(thread));
      if (memory_.unfinished[part.unit].fetch_sub(1, std::memory_order_acq_rel) == 1)
        table_.attention_merge(t, states + part.states, scratch(thread));
    });
  }

  AttentionTask task(const Step& step, int64_t unit) const {
    const QueryRows& piece = step.query_rows[unit / op_.kv_heads];
    const int64_t kv_head = unit % op_.kv_heads, group = op_.heads / op_.kv_heads, width = op_.heads * op_.head_dim;
    const int64_t at = piece.first_token * width + kv_head * group * op_.head_dim;
    return {.q = q_ + at,
            .out = out_ + at,
            .q_stride = width,
            .out_stride = width,
            .rows = piece.rows,
            .first_position = piece.first_position,
            .group = group,
            .head_dim = op_.head_dim,
            .format = kv_.format(),
            .kv = kv_.base(op_.layer, kv_head),
            .block_stride = kv_.block_bytes(),
            .blocks = step.batch.blocks.data() + step.batch.block_starts[piece.sequence],
            .scale = op_.scale,
            .softcap = op_.softcap,
            .window = op_.window,
            .chunk = op_.chunk,
            .sinks = sinks_.empty() ? nullptr : sinks_.data() + kv_head * group};
  }

  float* scratch(int thread) const { return memory_.scratch.data() + thread * memory_.stride; }

  const KernelTable& table_;
  const float* q_;
  float* out_;
  const KvPool& kv_;
  op::Attention op_;
  AttentionMemory& memory_;
  std::vector<float> sinks_;
};

}  // namespace

WholeFunction make_attention(const KernelTable& table, ThreadPool& pool, const Model& model, const Values& values,
                             const KvPool& kv, const op::Attention& op, AttentionMemory& memory) {
  return [attention = Attention(table, model, values, kv, op, memory), &pool](const Step& step) {
    attention.run(step, pool);
  };
}

}  // namespace kt
