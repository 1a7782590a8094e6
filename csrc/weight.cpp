#include "weight.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 40;
constexpr size_t kAlignment = 64;
constexpr size_t kSlab = size_t{64} << 20;

struct Block {
  int64_t elements, bytes;
};

// Sizes of the blocks that pack reads.
Block block_of(Format format) {
  switch (format) {
    case Format::kF32: return {1, 4};
    case Format::kF16: return {1, 2};
    case Format::kBF16: return {1, 2};
    case Format::kQ4_0: return {32, 18};
    case Format::kQ4_1: return {32, 20};
    case Format::kQ5_0: return {32, 22};
    case Format::kQ5_1: return {32, 24};
    case Format::kQ8_0: return {32, 34};
    case Format::kQ2_K: return {256, 84};
    case Format::kQ3_K: return {256, 110};
    case Format::kQ4_K: return {256, 144};
    case Format::kQ5_K: return {256, 176};
    case Format::kQ6_K: return {256, 210};
    case Format::kIQ4_NL: return {32, 18};
    case Format::kIQ4_XS: return {256, 136};
    case Format::kIQ1_S: return {256, 50};
    case Format::kIQ1_M: return {256, 56};
    case Format::kIQ2_XXS: return {256, 66};
    case Format::kIQ2_XS: return {256, 74};
    case Format::kIQ2_S: return {256, 82};
    case Format::kIQ3_XXS: return {256, 98};
    case Format::kIQ3_S: return {256, 110};
    case Format::kMXFP4: return {32, 17};
    case Format::kF8_E4M3: return {128, 132};
    case Format::kI4_32: return {32, 18};
    case Format::kI4_128: return {128, 66};
    case Format::kI4Z_32: return {32, 19};
    case Format::kI4Z_128: return {128, 67};
  }
  throw std::invalid_argument("format: unknown type " + std::to_string(static_cast<int32_t>(format)));
}

struct Place {
  std::shared_ptr<Mapping> memory;
  uint8_t* data;
};

// Most tensors are smaller than a huge page: they are laid one after another into slabs that are not.
Place place(size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Mapping> slab;
  static size_t used = 0;
  if (bytes > kSlab / 4) {
    auto own = std::make_shared<Mapping>(bytes);
    return {own, own->data()};
  }
  const std::lock_guard lock(mutex);
  std::shared_ptr<Mapping> memory = slab.lock();
  if (memory == nullptr || used + bytes > kSlab) {
    memory = std::make_shared<Mapping>(kSlab);
    slab = memory;
    used = 0;
  }
  uint8_t* data = memory->data() + used;
  used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return {memory, data};
}

// Advice about the pages that lie whole in [data, data + bytes); a kernel that does not take it is only slower.
void advise(const uint8_t* data, size_t bytes, int advice) {
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

}  // namespace

size_t source_bytes(Format format, int64_t rows, int64_t cols) {
  const Block block = block_of(format);
  if (rows <= 0 || cols <= 0 || rows > kMaxElements / cols)
    throw std::invalid_argument("rows, cols: " + std::to_string(rows) + " x " + std::to_string(cols) + " out of range");
  if (cols % block.elements != 0)
    throw std::invalid_argument("cols: " + std::to_string(cols) + " is no multiple of the format's block of " +
                                std::to_string(block.elements));
  return static_cast<size_t>(rows) * (cols / block.elements) * block.bytes;
}

Weight::Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, int64_t experts)
    : table_(&table), format_(format), rows_(rows), cols_(cols), experts_(experts) {
  check();
  Place where = place(bytes_);
  memory_ = std::move(where.memory);
  packed_ = where.data;
}

Weight::Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, std::vector<const uint8_t*> sources,
               size_t size)
    : table_(&table),
      format_(format),
      rows_(rows),
      cols_(cols),
      experts_(static_cast<int64_t>(sources.size())),
      sources_(std::move(sources)) {
  check();
  check_size(size);
}

Weight::Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, int64_t experts, Make make)
    : table_(&table), format_(format), rows_(rows), cols_(cols), experts_(experts), make_(std::move(make)) {
  check();
}

Weight::Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, int64_t experts, int node)
    : table_(&table), format_(format), rows_(rows), cols_(cols), experts_(experts) {
  check();
  memory_ = std::make_shared<Mapping>(bytes_, node);
  packed_ = memory_->data();
}

Weight::Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, int64_t experts, Cut cut,
               const std::vector<int>& nodes)
    : table_(&table), format_(format), rows_(rows), cols_(cols), experts_(experts), cut_(std::move(cut)) {
  check();
  check_cut(nodes);
  bytes_ = 0;
  for (size_t n = 0; n < nodes.size(); ++n) {
    const int64_t size = cut_.ends[n] - (n == 0 ? 0 : cut_.ends[n - 1]);
    parts_.push_back(cut_.columns ? Weight(table, format, rows, size, experts, nodes[n])
                                  : Weight(table, format, experts * size, cols, experts, nodes[n]));
    bytes_ += parts_.back().bytes();
  }
}

void Weight::check_cut(const std::vector<int>& nodes) const {
  const int64_t whole = cut_.columns ? cols_ : expert_rows(), step = cut_.columns ? block_of(format_).elements : 1;
  int64_t last = 0;
  for (const int64_t end : cut_.ends) {
    if (end <= last || end > whole || end % step != 0)
      throw std::invalid_argument("cut: " + std::to_string(end) + " after " + std::to_string(last) + " of " +
                                  std::to_string(whole) + " in blocks of " + std::to_string(step));
    last = end;
  }
  if (last != whole || cut_.ends.size() != nodes.size())
    throw std::invalid_argument("cut: must have an end for each node, the last of them " + std::to_string(whole));
}

void Weight::check() {
  source_bytes(format_, rows_, cols_);
  if (experts_ <= 0 || rows_ % experts_ != 0)
    throw std::invalid_argument("experts: " + std::to_string(experts_) + " do not divide " + std::to_string(rows_) +
                                " rows");
  bytes_ = table_->packed_bytes(format_, expert_rows(), cols_) * experts_;
  if (bytes_ == 0)
    throw std::invalid_argument("format: type " + std::to_string(static_cast<int32_t>(format_)) + " with " +
                                std::to_string(cols_) + " columns is not supported by " + table_->name);
}

void Weight::check_size(size_t size) const {
  if (const size_t expected = source_bytes(format_, expert_rows(), cols_); size != expected)
    throw std::invalid_argument("data: " + std::to_string(size) + " bytes, expected " + std::to_string(expected));
}

void Weight::pack_panels(int64_t expert, int64_t begin, int64_t end, uint8_t* packed) const {
  const std::shared_ptr<const uint8_t> made = make_ ? make_(expert) : nullptr;
  table_->pack(format_, made ? made.get() : sources_[expert], expert_rows(), cols_, begin, end, packed);
}

std::vector<uint8_t> Weight::samples() const {
  const int64_t wanted = make_ ? 2 : 16;  // all of an expert is made for it
  constexpr size_t kSampleBytes = 256;
  const size_t size = source_bytes(format_, expert_rows(), cols_), bytes = std::min(size, kSampleBytes);
  std::vector<uint8_t> all;
  for (int64_t e = 0; e < experts_; e += std::max(experts_ / wanted, int64_t{1})) {
    const std::shared_ptr<const uint8_t> made = make_ ? make_(e) : nullptr;
    const uint8_t* middle = (made ? made.get() : sources_[e]) + (size - bytes) / 2;
    all.insert(all.end(), middle, middle + bytes);
  }
  return all;
}

void Weight::will_need(int64_t expert) const {
  if (!make_) advise(sources_[expert], source_bytes(format_, expert_rows(), cols_), MADV_WILLNEED);
}

void Weight::release(int64_t expert) const {
  if (!make_) advise(sources_[expert], source_bytes(format_, expert_rows(), cols_), MADV_DONTNEED);
}

void Weight::pack(ThreadPool& pool, int64_t expert, const uint8_t* src, size_t size) {
  check_size(size);
  for (size_t n = 0; n < parts_.size(); ++n) pack_part(pool, n, expert, src);
  if (is_cut()) return;
  uint8_t* to = packed_ + expert * expert_bytes();
  const ThreadPool::Session session(pool);
  const int64_t chunks = std::min<int64_t>(panels(), int64_t{pool.threads()} * 8);
  pool.parallel_for(chunks, [&](int64_t chunk, int) {
    table_->pack(format_, src, expert_rows(), cols_, panels() * chunk / chunks, panels() * (chunk + 1) / chunks, to);
  });
}

void Weight::pack_part(ThreadPool& pool, size_t n, int64_t expert, const uint8_t* src) {
  Weight& part = parts_[n];
  const int64_t begin = n == 0 ? 0 : cut_.ends[n - 1];
  const size_t bytes = source_bytes(format_, part.expert_rows(), part.cols());
  const size_t row = source_bytes(format_, 1, cols_);
  if (!cut_.columns) return part.pack(pool, expert, src + begin * row, bytes);
  const Block block = block_of(format_);
  const uint8_t* from = src + begin / block.elements * block.bytes;
  const size_t part_row = source_bytes(format_, 1, part.cols());
  std::vector<uint8_t> columns(bytes);
  for (int64_t r = 0; r < part.expert_rows(); ++r)
    std::memcpy(columns.data() + r * part_row, from + r * row, part_row);
  part.pack(pool, expert, columns.data(), bytes);
}

}  // namespace kt
