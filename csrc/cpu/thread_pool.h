// A persistent fork-join pool: the calling thread works too, and workers sleep when there is nothing to do.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/numa.h"

namespace kt {

// Memory that a later job will read: for each thread the pieces that it will read first, in their order.
using ReadAhead = std::vector<std::vector<std::span<const uint8_t>>>;

// Each thread has a range of neighbouring chunks, claims them one by one from its front, and then takes from the end of
// others' ranges: a core that another process takes away for a moment holds back only the chunk it is in, not a share of
// the step, and what neighbouring chunks read lies in one sequence for the processor's prefetching.
class ThreadPool {
 public:
  // `threads` >= 1, the caller among them. Workers are pinned to one CPU each when the pool is as large as the affinity
  // mask; a smaller pool is left to the kernel, else all small pools of a machine would sit on the same CPUs. On a machine
  // with several NUMA nodes each thread stays on one. `pretended` nodes, at most as many as threads, are for tests: the
  // threads are shared out, and memory is wherever it comes from.
  explicit ThreadPool(int threads, int pretended = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // The number of each node that has threads, for Mapping; one where there is nothing to tell apart.
  const std::vector<int>& nodes() const { return nodes_; }

  // Calls fn(chunk, thread) for each chunk in [0, chunks), 0 <= thread < threads(); returns when all are done. What fn
  // wrote is then visible. fn must not throw, and must not call parallel_for. One caller at a time.
  template <class F>
  void parallel_for(int64_t chunks, F&& fn) {
    if (chunks <= 0) return;
    if (chunks == 1 || workers_.empty()) {
      for (int64_t i = 0; i < chunks; ++i) fn(i, 0);
      return;
    }
    share_out(0, chunks, 0, threads());
    run(chunks, &call<std::remove_reference_t<F>>, const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // The same where chunks are some node's: those from ends[n - 1] (0 for the first) to ends[n] that of node n, whose
  // threads have ranges of them; others take what they leave. As many ends as nodes(), or one for chunks of no node.
  template <class F>
  void parallel_for(const std::vector<int64_t>& ends, F&& fn) {
    if (ends.back() <= 0) return;
    if (workers_.empty() || ends.size() == 1) return parallel_for(ends.back(), fn);
    for (size_t n = 0; n < ends.size(); ++n)
      share_out(n == 0 ? 0 : ends[n - 1], ends[n], first_threads_[n], first_threads_[n + 1]);
    run(ends.back(), &call<std::remove_reference_t<F>>, const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Has threads that wait, from now on, fetch their part of what a later job will read, at most kAheadBytes of it: between
  // jobs memory would have nothing to do. Null: nothing.
  void will_read(const ReadAhead* next) { ahead_.store(next, std::memory_order_release); }
  static constexpr size_t kAheadBytes = size_t{256} << 10;

  // Kept as long as the pool: a thread may look at it at any time.
  const ReadAhead* keep(ReadAhead ahead);

  // Exclusive use by one calling thread, kept on the CPU that no worker is pinned to. (Only for the duration: threads
  // that the caller starts later must not inherit a mask of one CPU.) It may have another one within, between two jobs.
  class Session {
   public:
    explicit Session(ThreadPool& pool);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    ThreadPool& pool_;
    std::unique_lock<std::recursive_mutex> lock_;
    bool pinned_ = false;
    std::vector<uint8_t> mask_;
  };

 private:
  using Function = void (*)(void* context, int64_t chunk, int thread);

  // Chunks that nobody has claimed: the first in the upper half, the end in the lower. A line of its own for each
  // thread, which the others touch only when they have nothing of their own left.
  struct alignas(64) Range {
    uint64_t next = 0;  // what the next job begins with
    std::atomic<uint64_t> unclaimed{0};
    int64_t claim_first();  // -1: none left
    int64_t claim_last();
  };

  // How far a thread has fetched what will be read.
  struct alignas(64) Cursor {
    const ReadAhead* of = nullptr;
    size_t piece = 0, offset = 0, fetched = 0;
  };

  template <class Fn>
  static void call(void* context, int64_t chunk, int thread) {
    (*static_cast<Fn*>(context))(chunk, thread);
  }

  // Ranges of chunks [begin, end) for threads [first, last), from the next run on.
  void share_out(int64_t begin, int64_t end, int first, int last);
  void run(int64_t chunks, Function fn, void* context);
  void work(int thread);
  void worker(int thread);
  uint32_t wait_for_job(uint32_t seen, int thread);
  void fetch_ahead(int thread);

  // The job, in one line with what workers wait for. Written only while no chunk of the one before is unfinished; read
  // only after claiming a chunk, which keeps the job alive. So a worker that wakes up late, jobs later, finds either a
  // valid chunk or none.
  alignas(64) Function fn_ = nullptr;
  void* context_ = nullptr;
  std::atomic<uint32_t> job_{0};  // futex: changes with each job
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<const ReadAhead*> ahead_{nullptr};
  std::atomic<bool> stop_{false};

  alignas(64) std::atomic<int64_t> unfinished_{0};
  std::unique_ptr<Range[]> ranges_;
  std::unique_ptr<Cursor[]> cursors_;

  std::deque<ReadAhead> kept_;
  std::vector<std::thread> workers_;
  std::vector<int> nodes_, first_threads_;  // of each node, and all threads at the end
  std::vector<ThreadPlace> places_;         // of each thread
  std::recursive_mutex session_;
};

}  // namespace kt
