// Attention over the paged cache.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu/memory.h"
#include "ops/step.h"

namespace kt {

// The KV of all blocks. A block is contiguous: [layers][kv_heads] of what kernel_table.h describes.
class KvPool {
 public:
  KvPool() = default;
  // Reserves everything; a page costs memory when its first block is written. A pool is sized for the busiest hour, and
  // touching gigabytes at start would make a small model's load slow and its idle server large. (A first touch is one
  // fault for each 2 MiB.) std::invalid_argument, std::bad_alloc.
  KvPool(const CacheShape& shape, int64_t blocks);

  KvFormat format() const { return format_; }
  int64_t block_bytes() const { return block_bytes_; }

  // One whole block, to be copied. std::invalid_argument when there is no such block.
  std::span<uint8_t> block(int64_t block) const;

  // Block 0 of one layer and kv head; block b is block_bytes() * b further.
  uint8_t* base(int64_t layer, int64_t kv_head) const {
    return memory_.data() + (layer * kv_heads_ + kv_head) * head_bytes_;
  }

 private:
  Mapping memory_;
  KvFormat format_ = KvFormat::kBF16;
  int64_t blocks_ = 0, kv_heads_ = 0, head_bytes_ = 0, block_bytes_ = 0;
};

// Writes k and v of the rows to the cache.
RowFunction make_store_kv(const KernelTable& table, const Values& values, const KvPool& kv, const op::Attention& op);

// Writes the latent rows to the cache.
RowFunction make_store_latent(const KernelTable& table, const Values& values, const KvPool& kv,
                              const op::MlaAttention& op);

// With fewer units of work for each thread than this, attention is split along the positions too.
inline constexpr int64_t kSplitUnits = 4;

// What the attention ops of a program work in, one after another.
struct AttentionMemory {
  struct Part {
    int64_t unit, span;
    size_t states, state;  // offsets in `states` of the unit's first and of this part's
  };
  AttentionMemory(const KernelTable& table, const std::vector<Op>& ops, const std::vector<int64_t>& widths, int threads);

  size_t stride = 0;           // floats of scratch for each thread
  std::vector<float> scratch;
  std::vector<float> states;   // of the parts, one after another; as many as steps so far needed
  std::vector<Part> parts;
  std::unique_ptr<std::atomic<int64_t>[]> unfinished;  // parts of each unit
};

WholeFunction make_attention(const KernelTable& table, ThreadPool& pool, const Model& model, const Values& values,
                             const KvPool& kv, const op::Attention& op, AttentionMemory& memory);
WholeFunction make_attention(const KernelTable& table, ThreadPool& pool, const Values& values, const KvPool& kv,
                             const op::MlaAttention& op, AttentionMemory& memory);

}  // namespace kt
