#include "ops/limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "cpu/memory.h"

namespace kt {
namespace {

// A round is about a millisecond: long against the fork and join, short against the time that others take a core for.
constexpr int64_t kRoundsOfChunk = 8192, kChunksOfThread = 8;
constexpr int64_t kReadChunk = int64_t{1} << 20;
constexpr int kLeastPasses = 2;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

}  // namespace

double measure_peak(ThreadPool& pool, const KernelTable& table, Activation kind, double seconds) {
  const ThreadPool::Session session(pool);
  struct alignas(64) Sink {
    float value;
  };
  std::vector<Sink> sinks(pool.threads());
  double best = 0.0;
  const auto start = Clock::now();
  do {
    std::atomic<int64_t> done{0};
    const auto begin = Clock::now();
    pool.parallel_for(kChunksOfThread * pool.threads(), [&](int64_t, int thread) {
      done.fetch_add(table.peak(kind, kRoundsOfChunk, &sinks[thread].value), std::memory_order_relaxed);
    });
    best = std::max(best, static_cast<double>(done.load()) / seconds_since(begin));
  } while (best > 0.0 && seconds_since(start) < seconds);
  return best;
}

double measure_read(ThreadPool& pool, const KernelTable& table, int64_t bytes, double seconds) {
  const ThreadPool::Session session(pool);
  const int64_t chunks = (bytes + kReadChunk - 1) / kReadChunk;
  const Mapping data(static_cast<size_t>(chunks * kReadChunk));
  // Written first: pages that were never written are all the same page of zeros.
  pool.parallel_for(chunks, [&](int64_t i, int) { std::memset(data.data() + i * kReadChunk, 1, kReadChunk); });
  std::atomic<int32_t> sink{0};
  double best = 0.0;
  const auto start = Clock::now();
  for (int pass = 0; pass < kLeastPasses || seconds_since(start) < seconds; ++pass) {
    const auto begin = Clock::now();
    pool.parallel_for(chunks, [&](int64_t i, int) {
      sink.fetch_add(table.read(data.data() + i * kReadChunk, kReadChunk), std::memory_order_relaxed);
    });
    best = std::max(best, static_cast<double>(chunks * kReadChunk) / seconds_since(begin));
  }
  return best;
}

}  // namespace kt
