// Packed weights: made once at load by a table's pack, read-only afterwards.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/memory.h"
#include "cpu/thread_pool.h"

namespace kt {

// Bytes of `rows` x `cols` elements in the file's layout. std::invalid_argument: unknown format, sizes out of range, or
// cols not a multiple of the format's block.
size_t source_bytes(Format format, int64_t rows, int64_t cols);

// How experts are cut for the nodes of a machine (cpu/numa.h): part n has rows, or columns, ends[n - 1] (0 for the first) to
// ends[n] of each.
struct Cut {
  bool columns;
  std::vector<int64_t> ends;
};

// `rows` outputs of `cols` inputs, tied to the table that packed them. The rows may be those of several experts one after
// another, as many of each; then each expert has panels of its own, and no panel holds rows of two.
class Weight {
 public:
  // Room for panels of zeros; to be filled by pack, expert by expert. std::invalid_argument for sizes out of range, or a
  // format that the table does not take.
  Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, int64_t experts);

  // The same cut in parts, each in the memory of a node: as many `nodes`, their numbers, as ends. std::invalid_argument also
  // for ends that do not ascend to all rows or columns, or in the middle of a block.
  Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, int64_t experts, Cut cut,
         const std::vector<int>& nodes);

  // Repacks the `size` bytes of one expert at `src`, in parallel over panels. std::invalid_argument when the size does not
  // fit.
  void pack(ThreadPool& pool, int64_t expert, const uint8_t* src, size_t size);

  // Experts whose panels are not kept: sources[e] is `size` bytes of a file's read-only mapping, which must outlive this.
  // std::invalid_argument as above.
  Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, std::vector<const uint8_t*> sources,
         size_t size);

  // The same for experts whose bytes are put together from their file each time: `make` gives those of one, as many as
  // source_bytes says, for as long as its result lives. It may be called by any thread, and may throw.
  using Make = std::function<std::shared_ptr<const uint8_t>(int64_t expert)>;
  Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, int64_t experts, Make make);

  // The parts, if it is cut: then packed() is nullptr, too.
  bool is_cut() const { return !parts_.empty(); }
  const Cut& cut() const { return cut_; }
  const Weight& part(size_t n) const { return parts_[n]; }

  // Whether experts stay in their file: then packed() is nullptr, and pack_panels makes panels where they are wanted. It
  // throws what `make` throws.
  bool mapped() const { return !sources_.empty() || make_ != nullptr; }
  void pack_panels(int64_t expert, int64_t begin, int64_t end, uint8_t* packed) const;
  // A few bytes of some experts, all over the weight: to read all of it would take as long as to load it.
  std::vector<uint8_t> samples() const;
  // Have the kernel read an expert from the file, without waiting for it; give its pages back. (`make` does it itself.)
  void will_need(int64_t expert) const;
  void release(int64_t expert) const;

  const KernelTable& table() const { return *table_; }
  Format format() const { return format_; }
  int64_t rows() const { return rows_; }  // of all experts
  int64_t cols() const { return cols_; }
  int64_t experts() const { return experts_; }
  int64_t expert_rows() const { return rows_ / experts_; }
  int64_t panels() const { return (expert_rows() + kPanelRows - 1) / kPanelRows; }  // of one expert
  const uint8_t* packed(int64_t expert = 0) const { return packed_ == nullptr ? nullptr : packed_ + expert * expert_bytes(); }
  size_t expert_bytes() const { return bytes_ / experts_; }
  size_t panel_bytes() const { return expert_bytes() / panels(); }
  size_t bytes() const { return bytes_; }

  // Dequantised row of cols() floats; 0 <= i < rows().
  void row(int64_t i, float* out) const {
    table_->unpack_row(format_, packed(i / expert_rows()), expert_rows(), cols_, i % expert_rows(), out);
  }

 private:
  Weight(const KernelTable& table, Format format, int64_t rows, int64_t cols, int64_t experts, int node);
  void check();
  void check_cut(const std::vector<int>& nodes) const;
  void pack_part(ThreadPool& pool, size_t n, int64_t expert, const uint8_t* src);
  void check_size(size_t size) const;

  const KernelTable* table_;
  Format format_;
  int64_t rows_, cols_, experts_;
  size_t bytes_ = 0;
  std::vector<const uint8_t*> sources_;
  Make make_;
  std::shared_ptr<Mapping> memory_;  // often shared with other weights
  uint8_t* packed_ = nullptr;
  Cut cut_{};
  std::vector<Weight> parts_;
};

}  // namespace kt
