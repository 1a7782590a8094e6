#include "cpu/memory.h"

#include <sys/mman.h>

#include <new>
#include <utility>

#include "cpu/numa.h"

namespace kt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

Mapping::Mapping(size_t bytes, int node) : size_(bytes) {
  if (bytes == 0) return;
  const bool huge = bytes >= kHugePage;
  const size_t slack = huge ? kHugePage : 0;
  if (__builtin_add_overflow(bytes, slack, &reserved_)) throw std::bad_alloc();
  base_ = mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t start = reinterpret_cast<uintptr_t>(base_);
  const uintptr_t aligned = huge ? (start + kHugePage - 1) / kHugePage * kHugePage : start;
  data_ = reinterpret_cast<uint8_t*>(aligned);
  if (huge) madvise(data_, bytes, MADV_HUGEPAGE);  // advice: a kernel without it is only slower
  prefer_node(base_, reserved_, node);
}

Mapping::~Mapping() {
  if (base_ != nullptr) munmap(base_, reserved_);
}

Mapping::Mapping(Mapping&& other) noexcept { *this = std::move(other); }

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(base_, other.base_);
  std::swap(reserved_, other.reserved_);
  return *this;
}

}  // namespace kt
