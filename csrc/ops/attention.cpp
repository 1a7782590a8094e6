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

RowFunction make_store_latent(const KernelTable& table, const Values& values, const KvPool& kv,
                              const op::MlaAttention& op) {
  return [store = table.store_half, latent = values.data[op.latent], rope = values.data[op.rope], &kv, layer = op.layer,
          n = values.widths[op.latent], m = values.widths[op.rope]](const Step& step, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* block = kv.base(layer, 0) + step.token_block[r] * kv.block_bytes();
      uint16_t* row = reinterpret_cast<uint16_t*>(block) + step.positions[r] % kBlockTokens * (n + m);
      store(latent + r * n, n, row);
      store(rope + r * m, m, row + n);
    }
  };
}

namespace {

constexpr size_t kLine = 64 / sizeof(float);

// Vectors that cross lines take longer to store.
float* first_line(std::vector<float>& memory) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// Heads that read the same latent rows one after another, in one unit of work.
int64_t latent_group(int64_t heads) {
  for (int64_t group = 8; group > 1; --group)
    if (heads % group == 0) return group;
  return 1;
}

}  // namespace

AttentionMemory::AttentionMemory(const KernelTable& table, const std::vector<Op>& ops,
                                 const std::vector<int64_t>& widths, int threads)
    : unfinished(std::make_unique<std::atomic<int64_t>[]>(threads * kSplitUnits)) {
  for (const Op& any : ops) {
    AttentionTask task{};
    task.rows = kQueryRows;
    if (const auto* op = std::get_if<op::Attention>(&any)) {
      task.group = op->heads / op->kv_heads;
      task.head_dim = task.value_dim = op->head_dim;
    } else if (const auto* mla = std::get_if<op::MlaAttention>(&any)) {
      task.group = latent_group(mla->heads);
      task.value_dim = widths[mla->latent];
      task.head_dim = task.value_dim + widths[mla->rope];
    } else {
      continue;
    }
    stride = std::max(stride, (table.attention_scratch_floats(task) + kLine - 1) / kLine * kLine);
  }
  scratch.resize(stride * threads);
}

namespace {

// A unit of attention is one kv head, or a few heads that read latent rows, for one piece of query rows. They go in the
// order of their work, the longest first: what is left for the end is short.
class Attention {
 public:
  Attention(const KernelTable& table, const Model& model, const Values& values, const KvPool& kv, const op::Attention& op,
            AttentionMemory& memory)
      : table_(table), kv_(kv), memory_(memory), layer_(op.layer), units_(op.kv_heads) {
    base_.q = values.data[op.q];
    base_.out = values.data[op.out];
    base_.q_stride = base_.out_stride = op.heads * op.head_dim;
    base_.group = op.heads / op.kv_heads;
    base_.head_dim = base_.value_dim = op.head_dim;
    base_.format = kv.format();
    base_.block_stride = kv.block_bytes();
    base_.scale = op.scale;
    base_.softcap = op.softcap;
    base_.window = op.window;
    base_.chunk = op.chunk;
    base_.q_tail = base_.q;
    if (op.sinks != op::kNone) sinks_ = vector_of(*model.weights[op.sinks]);
  }

  Attention(const KernelTable& table, const Values& values, const KvPool& kv, const op::MlaAttention& op,
            AttentionMemory& memory)
      : table_(table), kv_(kv), memory_(memory), layer_(op.layer), units_(op.heads / latent_group(op.heads)) {
    base_.q = values.data[op.q_latent];
    base_.out = values.data[op.out];
    base_.q_stride = base_.out_stride = values.widths[op.q_latent];
    base_.group = latent_group(op.heads);
    base_.value_dim = values.widths[op.latent];
    base_.tail = values.widths[op.rope];
    base_.head_dim = base_.value_dim + base_.tail;
    base_.format = kv.format();
    base_.block_stride = kv.block_bytes();
    base_.scale = op.scale;
    base_.tail_stride = values.widths[op.q];
    base_.tail_head = base_.tail_stride / op.heads;
    base_.q_tail = values.data[op.q] + base_.tail_head - base_.tail;
  }

  void run(const Step& step, ThreadPool& pool) const {
    const int64_t units = static_cast<int64_t>(step.query_rows.size()) * units_;
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
    if (memory_.states.size() < floats + kLine) memory_.states.resize(floats + kLine);
    float* states = first_line(memory_.states);
    pool.parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t i, int thread) {
      const AttentionMemory::Part& part = parts[i];
      const AttentionTask t = task(step, part.unit);
      table_.attention_span(t, part.span, states + part.state, scratch(thread));
      if (memory_.unfinished[part.unit].fetch_sub(1, std::memory_order_acq_rel) == 1)
        table_.attention_merge(t, states + part.states, scratch(thread));
    });
  }

  AttentionTask task(const Step& step, int64_t unit) const {
    const QueryRows& piece = step.query_rows[unit / units_];
    const int64_t u = unit % units_, head = u * base_.group;
    AttentionTask t = base_;
    t.q += piece.first_token * t.q_stride + head * (t.head_dim - t.tail);
    t.out += piece.first_token * t.out_stride + head * t.value_dim;
    t.q_tail += piece.first_token * t.tail_stride + head * t.tail_head;
    t.rows = piece.rows;
    t.first_position = piece.first_position;
    t.kv = kv_.base(layer_, t.format == KvFormat::kLatent ? 0 : u);
    t.blocks = step.batch.blocks.data() + step.batch.block_starts[piece.sequence];
    t.sinks = sinks_.empty() ? nullptr : sinks_.data() + head;
    return t;
  }

  float* scratch(int thread) const { return memory_.scratch.data() + thread * memory_.stride; }

  const KernelTable& table_;
  const KvPool& kv_;
  AttentionMemory& memory_;
  int64_t layer_, units_;  // units of each piece of query rows
  AttentionTask base_{};   // what all tasks have in common, pointing at row 0 and head 0
  std::vector<float> sinks_;
};

}  // namespace

WholeFunction make_attention(const KernelTable& table, ThreadPool& pool, const Model& model, const Values& values,
                             const KvPool& kv, const op::Attention& op, AttentionMemory& memory) {
  return [attention = Attention(table, model, values, kv, op, memory), &pool](const Step& step) {
    attention.run(step, pool);
  };
}

WholeFunction make_attention(const KernelTable& table, ThreadPool& pool, const Values& values, const KvPool& kv,
                             const op::MlaAttention& op, AttentionMemory& memory) {
  return [attention = Attention(table, values, kv, op, memory), &pool](const Step& step) { attention.run(step, pool); };
}

}  // namespace kt
