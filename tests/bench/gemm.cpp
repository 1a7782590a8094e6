// The bare product of one kernel table: GOPS, and GB/s of packed weights, for a shape, a format and a number of rows.
//
//   gemm ISA FORMAT OUT COLS ROWS [THREADS [COPIES [FAR]]]
//
// Threads split the panels; they are started once for some rounds and spin between them, so that only the kernel is timed.
// COPIES weights are gone through in turn: enough of them to exceed the caches measure what streaming from memory costs.
// Rounds that only read the same weights take turns with those of the product: what memory gives drifts.
// With FAR the input is presented for a precise product, FAR percent of its groups with an element far out.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"

namespace {

// Of one thread its CPU time, which other work on the machine disturbs least; of several what the clock on the wall says.
double seconds_now(int threads) {
  timespec t;
  clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

uint8_t* huge_pages(size_t bytes) {
  constexpr size_t kHuge = size_t{2} << 20;
  void* p = std::aligned_alloc(kHuge, (bytes + kHuge - 1) / kHuge * kHuge);
  if (!p) std::abort();
  madvise(p, bytes, MADV_HUGEPAGE);
  std::memset(p, 0, bytes);
  return static_cast<uint8_t*>(p);
}

struct Case {
  const kt::KernelTable* table;
  kt::Format format;
  int64_t out, cols, rows;
  kt::Activation kind;
  const uint8_t* weights;
  size_t weight_bytes;
  const uint8_t *act, *far_out;  // far_out null: not kInt8FarOut
  float* y;
};

constexpr int64_t kFarOutPanels = 18;  // as in ops/linear.cpp

void run_share(const Case& c, int copies, int thread, int threads) {
  const int64_t panels = (c.out + kt::kPanelRows - 1) / kt::kPanelRows;
  const int64_t begin = panels * thread / threads, end = panels * (thread + 1) / threads;
  const int64_t step = c.far_out ? kFarOutPanels : end - begin;
  for (int i = 0; i < copies; ++i) {
    const uint8_t* weights = c.weights + static_cast<size_t>(i) * c.weight_bytes;
    for (int64_t first = begin; first < end; first += step) {
      const int64_t stop = std::min(end, first + step);
      c.table->gemm(c.format, weights, c.out, c.cols, c.kind, c.act, c.rows, first, stop, nullptr, c.y, c.out);
      if (c.far_out) c.table->add_far_out(c.format, weights, c.out, c.cols, c.far_out, first, stop, c.y, c.out);
    }
  }
}

// The bytes of a share, and nothing computed with them: the limit of run_share.
void read_share(const Case& c, int copies, int thread, int threads) {
  const size_t bytes = c.weight_bytes * static_cast<size_t>(copies);
  const size_t part = bytes / static_cast<size_t>(threads) & ~size_t{255};
  static std::atomic<int32_t> sink{0};
  sink.fetch_add(c.table->read(c.weights + static_cast<size_t>(thread) * part, static_cast<int64_t>(part)));
}

using Share = void (*)(const Case&, int copies, int thread, int threads);

// Seconds of each round, added to `seconds`.
void measure(Share share, const Case& c, int copies, int threads, int rounds, std::vector<double>& seconds) {
  std::atomic<int> round{0}, done{0};
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back([&, t] {
      for (int i = 1; i <= rounds; ++i) {
        while (round.load(std::memory_order_acquire) < i) {
        }
        share(c, copies, t, threads);
        done.fetch_add(1, std::memory_order_release);
      }
    });
  }
  for (int i = 1; i <= rounds; ++i) {
    const double start = seconds_now(threads);
    round.store(i, std::memory_order_release);
    share(c, copies, 0, threads);
    while (done.load(std::memory_order_acquire) < i * (threads - 1)) {
    }
    seconds.push_back(seconds_now(threads) - start);
  }
  for (auto& t : others) t.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: gemm ISA FORMAT OUT COLS ROWS [THREADS [COPIES [FAR]]]\n");
    return 2;
  }
  Case c{};
  c.table = kt::find_table(argv[1]);
  c.format = static_cast<kt::Format>(std::atoi(argv[2]));
  c.out = std::atoll(argv[3]);
  c.cols = std::atoll(argv[4]);
  c.rows = std::atoll(argv[5]);
  const int threads = argc > 6 ? std::atoi(argv[6]) : 1, copies = argc > 7 ? std::atoi(argv[7]) : 1;
  c.weight_bytes = c.table ? c.table->packed_bytes(c.format, c.out, c.cols) : 0;
  if (!c.weight_bytes || c.rows < 1 || threads < 1 || copies < 1) {
    std::fprintf(stderr, "gemm: an instruction set, format or shape that is not there\n");
    return 2;
  }
  std::mt19937 random(1);
  // Random bits are weights too, but for float16 scales that must not be huge: small integers serve.
  uint8_t* weights = huge_pages(c.weight_bytes * static_cast<size_t>(copies));
  for (size_t i = 0; i < c.weight_bytes * static_cast<size_t>(copies); ++i) weights[i] = random() & 0x3F;
  c.weights = weights;
  std::vector<float> x(static_cast<size_t>(c.rows * c.cols));
  for (float& v : x) v = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  const int far = argc > 8 ? std::atoi(argv[8]) : -1;
  for (int64_t g = 0; g < c.rows * c.cols / 32; ++g)
    if (static_cast<int>(random() % 100) < far) x[static_cast<size_t>(g * 32 + random() % 32)] = 10.0f;
  c.kind = far < 0 ? c.table->activation(c.format) : kt::Activation::kInt8FarOut;
  uint8_t* act = huge_pages(c.table->activation_bytes(c.kind, c.cols) * static_cast<size_t>(c.rows));
  const double start = seconds_now(1);
  c.table->quantize(c.kind, x.data(), c.cols, c.rows, c.cols, act);
  const double quantize = seconds_now(1) - start;
  c.act = act;
  if (far >= 0) {
    uint8_t* index = huge_pages(c.table->far_out_bytes(c.rows, c.cols));
    c.table->index_far_out(act, c.rows, c.cols, index);
    c.far_out = index;
  }
  c.y = reinterpret_cast<float*>(huge_pages(static_cast<size_t>(c.rows * c.out) * sizeof(float)));

  std::vector<double> seconds, reading;
  measure(run_share, c, copies, threads, 1, seconds);
  constexpr int kTurns = 8;
  const int rounds = std::clamp(static_cast<int>(0.5 / seconds[0] / kTurns), 1, 250);
  seconds.clear();
  for (int turn = 0; turn < kTurns; ++turn) {
    measure(run_share, c, copies, threads, rounds, seconds);
    measure(read_share, c, copies, threads, rounds, reading);
  }
  std::sort(seconds.begin(), seconds.end());
  std::sort(reading.begin(), reading.end());
  const double ops = 2.0 * static_cast<double>(c.out * c.cols * c.rows) * copies;
  const double bytes = static_cast<double>(c.weight_bytes) * copies;
  const double best = seconds.front(), median = seconds[seconds.size() / 2];
  const double read_best = bytes / reading.front() / 1e9, read_median = bytes / reading[reading.size() / 2] / 1e9;
  std::printf("%-12s format %2d  %lld x %lld  rows %lld  threads %d: best %.1f us, median %.1f us, "
              "GOPS best %.0f median %.0f, GB/s best %.1f median %.1f, reading alone %.1f %.1f, quantize %.2f ns/element\n",
              c.table->name, static_cast<int>(c.format), static_cast<long long>(c.out), static_cast<long long>(c.cols),
              static_cast<long long>(c.rows), threads, best * 1e6, median * 1e6, ops / best / 1e9, ops / median / 1e9,
              bytes / best / 1e9, bytes / median / 1e9, read_best, read_median,
              quantize * 1e9 / static_cast<double>(c.rows * c.cols));
  return 0;
}
