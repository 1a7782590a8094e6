#include "ops/attention.h"

#include <stdexcept>

namespace kt {

KvPool::KvPool(const CacheShape& shape, int64_t blocks)
    : kv_heads_(shape.kv_heads), head_stride_(2 * shape.head_dim * kBlockTokens) {
  int64_t bytes = 0;
  if (blocks <= 0) throw std::invalid_argument("blocks: must be positive");
  if (__builtin_mul_overflow(shape.layers * shape.kv_heads, head_stride_, &block_stride_) ||
      __builtin_mul_overflow(block_stride_ * 2, blocks, &bytes))
    throw std::invalid_argument("blocks: the cache does not fit the address space");
  memory_ = Mapping(static_cast<size_t>(bytes));
}

RowFunction make_store_kv(const KernelTable& table, const Values& values, const KvPool& kv, const op::Attention& op) {
  return [store = table.store_kv, k = values.data[op.k], v = values.data[op.v], &kv, layer = op.layer,
          kv_heads = op.kv_heads, head_dim = op.head_dim](const Step& step, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t at = (r * kv_heads + h) * head_dim;
        store(k + at, v + at, head_dim, step.positions[r] % kBlockTokens,
              kv.base(layer, h) + step.token_block[r] * kv.block_stride());
      }
    }
  };
}

size_t attention_scratch(const KernelTable& table, const op::Attention& op) {
  AttentionTask task{};
  task.rows = kQueryRows;
  task.group = op.heads / op.kv_heads;
  task.head_dim = op.head_dim;
  return table.attention_scratch_floats(task);
}

WholeFunction make_attention(const KernelTable& table, ThreadPool& pool, const Values& values, const KvPool& kv,
                             const op::Attention& op, float* scratch, size_t scratch_stride) {
  return [&table, &pool, q = values.data[op.q], out = values.data[op.out], &kv, op, scratch,
          scratch_stride](const Step& step) {
    const int64_t group = op.heads / op.kv_heads, width = op.heads * op.head_dim;
    const int64_t pieces = static_cast<int64_t>(step.query_rows.size());
    pool.parallel_for(pieces * op.kv_heads, [&](int64_t chunk, int thread) {
      // Later rows see more, so they go first: what is left for the end is short.
      const QueryRows& piece = step.query_rows[pieces - 1 - chunk / op.kv_heads];
      const int64_t kv_head = chunk % op.kv_heads;
      const int64_t at = piece.first_token * width + kv_head * group * op.head_dim;
      const AttentionTask task{.q = q + at,
                               .out = out + at,
                               .q_stride = width,
                               .out_stride = width,
                               .rows = piece.rows,
                               .first_position = piece.first_position,
                               .group = group,
                               .head_dim = op.head_dim,
                               .kv = kv.base(op.layer, kv_head),
                               .block_stride = kv.block_stride(),
                               .blocks = step.batch.blocks.data() + step.batch.block_starts[piece.sequence],
                               .scale = op.scale,
                               .softcap = op.softcap,
                               .window = op.window};
      table.attention(task, scratch + thread * scratch_stride);
    });
  };
}

}  // namespace kt
