// Attention over the paged cache.
#pragma once
#include <cstdint>

#include "cpu/memory.h"
#include "ops/step.h"

namespace kt {

// The KV of all blocks, float16. A block is contiguous: [layers][kv_heads] of what kernel_table.h describes.
class KvPool {
 public:
  KvPool() = default;
  // Reserves everything; a page costs memory when its first block is written. A pool is sized for the busiest hour, and
  // touching gigabytes at start would make a small model's load slow and its idle server large. (A first touch is one
  // fault for each 2 MiB.) std::invalid_argument, std::bad_alloc.
  KvPool(const CacheShape& shape, int64_t blocks);

  int64_t block_bytes() const { return block_stride_ * static_cast<int64_t>(sizeof(uint16_t)); }
  int64_t block_stride() const { return block_stride_; }  // in float16 elements

  // Block 0 of one layer and kv head; block b is block_stride() * b further.
  uint16_t* base(int64_t layer, int64_t kv_head) const {
    return memory_.as<uint16_t>() + (layer * kv_heads_ + kv_head) * head_stride_;
  }

 private:
  Mapping memory_;
  int64_t kv_heads_ = 0, head_stride_ = 0, block_stride_ = 0;
};

// Writes k and v of the rows to the cache.
RowFunction make_store_kv(const KernelTable& table, const Values& values, const KvPool& kv, const op::Attention& op);

// Floats of scratch that one thread needs.
size_t attention_scratch(const KernelTable& table, const op::Attention& op);

// scratch: thread t has `scratch_stride` floats from scratch + t * scratch_stride.
WholeFunction make_attention(const KernelTable& table, ThreadPool& pool, const Values& values, const KvPool& kv,
                             const op::Attention& op, float* scratch, size_t scratch_stride);

}  // namespace kt
