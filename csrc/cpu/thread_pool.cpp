#include "cpu/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>

namespace kt {
namespace {

// Within a step the next job comes in a few microseconds, between steps in hundreds: spin for the first kind, sleep for
// the second.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kSpinsBetweenClockReads = 32;
constexpr int kSpinsBeforeYield = 2000;

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain 32-bit word");

void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

std::vector<uint8_t> affinity_mask() {
  // The kernel refuses a buffer smaller than its own mask (EINVAL), so grow.
  for (size_t bytes = sizeof(cpu_set_t); bytes <= (1u << 16); bytes *= 2) {
    std::vector<uint8_t> mask(bytes);
    if (sched_getaffinity(0, bytes, reinterpret_cast<cpu_set_t*>(mask.data())) == 0) return mask;
  }
  return {};
}

std::vector<int> cpus_of(const std::vector<uint8_t>& mask) {
  std::vector<int> cpus;
  for (size_t i = 0; i < mask.size() * 8; ++i)
    if (mask[i / 8] >> (i % 8) & 1) cpus.push_back(static_cast<int>(i));
  return cpus;
}

// Best effort: a container may forbid it, and an unpinned thread is only slower.
bool pin_current_thread(int cpu, size_t mask_bytes) {
  std::vector<uint8_t> mask(mask_bytes);
  mask[cpu / 8] = static_cast<uint8_t>(1 << (cpu % 8));
  return sched_setaffinity(0, mask.size(), reinterpret_cast<const cpu_set_t*>(mask.data())) == 0;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  const std::vector<uint8_t> mask = affinity_mask();
  std::vector<int> cpus = cpus_of(mask);
  if (threads > 1 && cpus.size() == static_cast<size_t>(threads)) cpus_ = std::move(cpus);
  workers_.reserve(threads - 1);
  for (int t = 1; t < threads; ++t) {
    workers_.emplace_back([this, t, bytes = mask.size()] {
      pthread_setname_np(pthread_self(), "kt-compute");
      if (!cpus_.empty()) pin_current_thread(cpus_[t], bytes);
      worker(t);
    });
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_seq_cst);
  job_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(job_, INT_MAX);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t chunks, Function fn, void* context) {
  fn_ = fn;
  context_ = context;
  chunks_ = chunks;
  unfinished_.store(chunks, std::memory_order_relaxed);
  unclaimed_.store(chunks, std::memory_order_release);
  // Sequentially consistent on both sides: either the sleeper sees the new job, or we see the sleeper.
  job_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0)
    futex_wake(job_, static_cast<int>(std::min<int64_t>(chunks - 1, INT_MAX)));
  work(0);
  for (int spins = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpinsBeforeYield) {
      cpu_relax();
    } else {
      sched_yield();  // the worker we wait for may have lost its CPU to us
    }
  }
}

void ThreadPool::work(int thread) {
  int64_t done = 0;
  for (int64_t left = unclaimed_.load(std::memory_order_relaxed); left > 0;) {
    if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
    fn_(context_, chunks_ - left, thread);
    ++done;
    left = unclaimed_.load(std::memory_order_relaxed);
  }
  if (done > 0) unfinished_.fetch_sub(done, std::memory_order_release);
}

uint32_t ThreadPool::wait_for_job(uint32_t seen) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kSpinsBetweenClockReads; ++i) {
      const uint32_t job = job_.load(std::memory_order_acquire);
      if (job != seen) return job;
      cpu_relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (job_.load(std::memory_order_seq_cst) == seen) futex_wait(job_, seen);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return job_.load(std::memory_order_acquire);
}

void ThreadPool::worker(int thread) {
  for (uint32_t seen = 0;;) {
    seen = wait_for_job(seen);
    if (stop_.load(std::memory_order_relaxed)) return;
    work(thread);
  }
}

ThreadPool::Session::Session(ThreadPool& pool) : lock_(pool.session_) {
  if (pool.cpus_.empty()) return;
  mask_ = affinity_mask();
  pinned_ = !mask_.empty() && pin_current_thread(pool.cpus_[0], mask_.size());
}

ThreadPool::Session::~Session() {
  if (pinned_) sched_setaffinity(0, mask_.size(), reinterpret_cast<const cpu_set_t*>(mask_.data()));
}

}  // namespace kt
