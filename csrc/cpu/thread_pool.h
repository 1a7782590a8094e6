// A persistent fork-join pool: the calling thread works too, and workers sleep when there is nothing to do.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace kt {

// Chunks are claimed one by one from a shared counter, never handed to a thread beforehand: a core that another process
// takes away for a moment then holds back only the chunk it is in, not a share of the step.
class ThreadPool {
 public:
  // `threads` >= 1, the caller among them. Workers are pinned to one CPU each when the pool is as large as the affinity
  // mask; a smaller pool is left to the kernel, else all small pools of a machine would sit on the same CPUs.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls fn(chunk, thread) for each chunk in [0, chunks), 0 <= thread < threads(); returns when all are done. What fn
  // wrote is then visible. fn must not throw, and must not call parallel_for. One caller at a time.
  template <class F>
  void parallel_for(int64_t chunks, F&& fn) {
    if (chunks <= 0) return;
    if (chunks == 1 || workers_.empty()) {
      for (int64_t i = 0; i < chunks; ++i) fn(i, 0);
      return;
    }
    using Fn = std::remove_reference_t<F>;
    run(chunks, [](void* f, int64_t chunk, int thread) { (*static_cast<Fn*>(f))(chunk, thread); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Exclusive use by one calling thread, kept on the CPU that no worker is pinned to. (Only for the duration: threads
  // that the caller starts later must not inherit a mask of one CPU.)
  class Session {
   public:
    explicit Session(ThreadPool& pool);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    std::unique_lock<std::mutex> lock_;
    bool pinned_ = false;
    std::vector<uint8_t> mask_;
  };

 private:
  using Function = void (*)(void* context, int64_t chunk, int thread);

  void run(int64_t chunks, Function fn, void* context);
  void work(int thread);
  void worker(int thread);
  uint32_t wait_for_job(uint32_t seen);

  // The job. Written only while no chunk of the one before is unfinished; read only after claiming a chunk, which keeps
  // the job alive. So a worker that wakes up late, jobs later, finds either a valid chunk or none.
  Function fn_ = nullptr;
  void* context_ = nullptr;
  int64_t chunks_ = 0;

  alignas(64) std::atomic<int64_t> unclaimed_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> job_{0};  // futex: changes with each job
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stop_{false};

  std::vector<std::thread> workers_;
  std::vector<int> cpus_;  // one for each thread when pinned, else empty
  std::mutex session_;
};

}  // namespace kt
