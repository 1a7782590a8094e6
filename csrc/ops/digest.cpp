#include "ops/digest.h"

#include <bit>
#include <cstring>
#include <vector>

namespace kt {
namespace {

constexpr size_t kChunk = size_t{256} << 10;
constexpr uint64_t kOdd1 = 0x9E3779B185EBCA87, kOdd2 = 0xC2B2AE3D27D4EB4F;

uint64_t load(const uint8_t* data, size_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, data, bytes);
  return word;
}

uint64_t mix(uint64_t state, uint64_t word) { return std::rotl(state + word * kOdd2, 31) * kOdd1; }

// Four independent lanes, each step of which can be undone: a difference in one word cannot vanish. (The scheme of
// xxHash's XXH64 by Yann Collet.)
uint64_t digest_chunk(const uint8_t* data, size_t size) {
  uint64_t lanes[4] = {kOdd1, kOdd2, ~kOdd1, ~kOdd2};
  size_t at = 0;
  for (; at + 32 <= size; at += 32)
    for (int i = 0; i < 4; ++i) lanes[i] = mix(lanes[i], load(data + at + 8 * i, 8));
  uint64_t all = size;
  for (const uint64_t lane : lanes) all = mix(all, lane);
  for (; at < size; at += 8) all = mix(all, load(data + at, size - at < 8 ? size - at : 8));
  all = (all ^ all >> 33) * kOdd2;
  return all ^ all >> 29;
}

}  // namespace

uint64_t digest(ThreadPool& pool, const uint8_t* data, size_t size) {
  std::vector<uint64_t> chunks((size + kChunk - 1) / kChunk);
  const ThreadPool::Session session(pool);
  pool.parallel_for(static_cast<int64_t>(chunks.size()), [&](int64_t i, int) {
    const size_t at = static_cast<size_t>(i) * kChunk;
    chunks[i] = digest_chunk(data + at, size - at < kChunk ? size - at : kChunk);
  });
  return digest_chunk(reinterpret_cast<const uint8_t*>(chunks.data()), chunks.size() * sizeof(uint64_t));
}

}  // namespace kt
