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
constexpr size_t kLine = 64, kFetchedAtOnce = 8 * kLine;
constexpr uint64_t kFirstUnit = uint64_t{1} << 32;

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
bool pin_current_thread(const std::vector<int>& cpus, size_t mask_bytes) {
  std::vector<uint8_t> mask(mask_bytes);
  for (const int cpu : cpus) mask[cpu / 8] = static_cast<uint8_t>(mask[cpu / 8] | 1 << (cpu % 8));
  return sched_setaffinity(0, mask.size(), reinterpret_cast<const cpu_set_t*>(mask.data())) == 0;
}

}  // namespace

ThreadPool::ThreadPool(int threads, int pretended)
    : ranges_(std::make_unique<Range[]>(threads)), cursors_(std::make_unique<Cursor[]>(threads)) {
  const std::vector<uint8_t> mask = affinity_mask();
  const std::vector<int> cpus = cpus_of(mask);
  std::vector<NumaNode> nodes = numa_nodes(cpus);
  if (threads < static_cast<int>(nodes.size())) nodes = {{-1, cpus}};
  places_ = place_threads(nodes, threads);
  for (const NumaNode& node : nodes) nodes_.push_back(node.number);
  if (pretended > 0) {
    nodes_.assign(pretended, -1);
    for (int t = 0; t < threads; ++t) places_[t].node = t * pretended / threads;
  }
  for (int t = 0; t < threads; ++t)
    if (t == 0 || places_[t].node != places_[t - 1].node) first_threads_.push_back(t);
  first_threads_.push_back(threads);
  workers_.reserve(threads - 1);
  for (int t = 1; t < threads; ++t) {
    workers_.emplace_back([this, t, bytes = mask.size()] {
      pthread_setname_np(pthread_self(), "kt-compute");
      if (!places_[t].cpus.empty()) pin_current_thread(places_[t].cpus, bytes);
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

int64_t ThreadPool::Range::claim_first() {
  uint64_t range = unclaimed.load(std::memory_order_relaxed);
  while (range >> 32 < static_cast<uint32_t>(range))
    if (unclaimed.compare_exchange_weak(range, range + kFirstUnit, std::memory_order_acquire, std::memory_order_relaxed))
      return static_cast<int64_t>(range >> 32);
  return -1;
}

int64_t ThreadPool::Range::claim_last() {
  uint64_t range = unclaimed.load(std::memory_order_relaxed);
  while (range >> 32 < static_cast<uint32_t>(range))
    if (unclaimed.compare_exchange_weak(range, range - 1, std::memory_order_acquire, std::memory_order_relaxed))
      return static_cast<int64_t>(static_cast<uint32_t>(range)) - 1;
  return -1;
}

void ThreadPool::share_out(int64_t begin, int64_t end, int first, int last) {
  const int64_t chunks = end - begin, count = last - first;
  for (int64_t t = 0; t < count; ++t) {
    const uint64_t from = begin + chunks * t / count, to = begin + chunks * (t + 1) / count;
    ranges_[first + t].next = from << 32 | to;
  }
}

void ThreadPool::run(int64_t chunks, Function fn, void* context) {
  fn_ = fn;
  context_ = context;
  unfinished_.store(chunks, std::memory_order_relaxed);
  for (int t = 0; t < threads(); ++t) ranges_[t].unclaimed.store(ranges_[t].next, std::memory_order_release);
  // Sequentially consistent on both sides: either the sleeper sees the new job, or we see the sleeper.
  job_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0)
    futex_wake(job_, static_cast<int>(std::min<int64_t>(chunks - 1, INT_MAX)));
  work(0);
  for (int spins = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpinsBeforeYield) {
      fetch_ahead(0);
      cpu_relax();
    } else {
      sched_yield();  // the worker we wait for may have lost its CPU to us
    }
  }
}

void ThreadPool::work(int thread) {
  int64_t done = 0, chunk;
  for (; (chunk = ranges_[thread].claim_first()) >= 0; ++done) fn_(context_, chunk, thread);
  const auto help = [&](int other) {
    for (; (chunk = ranges_[other].claim_last()) >= 0; ++done) fn_(context_, chunk, thread);
  };
  // Those of the same node first: what they read is near.
  const int count = threads(), first = first_threads_[places_[thread].node];
  const int near = first_threads_[places_[thread].node + 1] - first;
  for (int i = 1; i < near; ++i) help(first + (thread - first + i) % near);
  for (int i = near; i < count; ++i) help((first + i) % count);
  if (done > 0) unfinished_.fetch_sub(done, std::memory_order_release);
}

const ReadAhead* ThreadPool::keep(ReadAhead ahead) {
  const std::lock_guard lock(session_);
  return &kept_.emplace_back(std::move(ahead));
}

// A few lines, so that what is waited for is looked at again soon.
void ThreadPool::fetch_ahead(int thread) {
  const ReadAhead* ahead = ahead_.load(std::memory_order_acquire);
  if (ahead == nullptr) return;
  Cursor& at = cursors_[thread];
  if (at.of != ahead) at = {ahead, 0, 0, 0};
  const auto& pieces = (*ahead)[thread];
  if (at.piece == pieces.size() || at.fetched >= kAheadBytes) return;
  const std::span<const uint8_t> piece = pieces[at.piece];
  const size_t end = std::min(at.offset + kFetchedAtOnce, piece.size());
  for (size_t i = at.offset; i < end; i += kLine) __builtin_prefetch(piece.data() + i, 0, 2);
  at.fetched += end - at.offset;
  at.offset = end;
  if (end == piece.size()) {
    ++at.piece;
    at.offset = 0;
  }
}

uint32_t ThreadPool::wait_for_job(uint32_t seen, int thread) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kSpinsBetweenClockReads; ++i) {
      const uint32_t job = job_.load(std::memory_order_acquire);
      if (job != seen) return job;
      fetch_ahead(thread);
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
    seen = wait_for_job(seen, thread);
    if (stop_.load(std::memory_order_relaxed)) return;
    work(thread);
  }
}

ThreadPool::Session::Session(ThreadPool& pool) : pool_(pool), lock_(pool.session_) {
  const std::vector<int>& cpus = pool.places_[0].cpus;
  if (cpus.empty()) return;
  mask_ = affinity_mask();
  pinned_ = !mask_.empty() && pin_current_thread(cpus, mask_.size());
}

ThreadPool::Session::~Session() {
  pool_.will_read(nullptr);
  if (pinned_) sched_setaffinity(0, mask_.size(), reinterpret_cast<const cpu_set_t*>(mask_.data()));
}

}  // namespace kt
