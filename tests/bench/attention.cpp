// Attention of one kernel table: one thread's CPU time for the kv heads of a model, in turn.
//
//   attention ISA ROWS CONTEXT GROUP HEAD_DIM KV_HEADS [int8]
//
// ROWS new positions after CONTEXT older ones; KV_HEADS counts those of all layers, whose caches lie in the same
// blocks.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/dispatch.h"

namespace {

constexpr int64_t kRows = 16;  // of a task

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

uint8_t* huge_pages(size_t bytes) {
  constexpr size_t kHuge = size_t{2} << 20;
  void* p = std::aligned_alloc(kHuge, (bytes + kHuge - 1) / kHuge * kHuge);
  if (!p) std::abort();
  madvise(p, bytes, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(p);
}

}  // namespace

int main(int argc, char** argv) {
  const kt::KernelTable* table = argc >= 7 && argc <= 8 ? kt::find_table(argv[1]) : nullptr;
  if (!table) {
    std::fprintf(stderr, "usage: attention ISA ROWS CONTEXT GROUP HEAD_DIM KV_HEADS [int8]\n");
    return 2;
  }
  const int64_t rows = std::atoll(argv[2]), context = std::atoll(argv[3]), group = std::atoll(argv[4]);
  const int64_t head_dim = std::atoll(argv[5]), kv_heads = std::atoll(argv[6]), length = context + rows;
  const int64_t blocks = (length + kt::kBlockTokens - 1) / kt::kBlockTokens;
  const kt::KvFormat format = argc == 8 ? kt::KvFormat::kInt8 : kt::KvFormat::kBF16;
  const int64_t head = kt::kv_head_bytes(format, head_dim);
  const size_t bytes = static_cast<size_t>(blocks * kv_heads * head);
  uint8_t* kv = huge_pages(bytes);
  std::mt19937 random(1);
  const auto fill = [&](std::vector<float>& x) {
    for (float& v : x) v = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  };
  std::vector<float> k(head_dim), v(head_dim), q(rows * group * head_dim), out(q.size());
  for (int64_t p = 0; p < length; ++p) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      fill(k);
      fill(v);
      uint8_t* block = kv + (p / kt::kBlockTokens * kv_heads + h) * head;
      table->store_kv(format, k.data(), v.data(), head_dim, p % kt::kBlockTokens, block);
    }
  }
  fill(q);
  std::vector<int32_t> table_of_blocks(blocks);
  std::iota(table_of_blocks.begin(), table_of_blocks.end(), 0);

  kt::AttentionTask task{};
  task.q_stride = task.out_stride = group * head_dim;
  task.rows = std::min(kRows, rows);
  task.group = group;
  task.head_dim = task.value_dim = head_dim;
  task.q_tail = q.data();
  task.format = format;
  task.block_stride = kv_heads * head;
  task.blocks = table_of_blocks.data();
  task.scale = 0.125f;
  std::vector<float> scratch(table->attention_scratch_floats(task));
  double best = 1e9;
  for (int round = 0; round < 7; ++round) {
    const double start = cpu_seconds();
    for (int64_t h = 0; h < kv_heads; ++h) {
      task.kv = kv + h * head;
      for (int64_t r = 0; r < rows; r += kRows) {
        task.q = q.data() + r * group * head_dim;
        task.out = out.data() + r * group * head_dim;
        task.rows = std::min(kRows, rows - r);
        task.first_position = context + r;
        table->attention(task, scratch.data());
      }
    }
    best = std::min(best, cpu_seconds() - start);
  }
  const double scores = static_cast<double>(rows) * (static_cast<double>(context) + static_cast<double>(rows + 1) / 2);
  const double ops = 4.0 * scores * static_cast<double>(group * head_dim * kv_heads);
  std::printf("%-12s rows %lld  context %lld  group %lld  head_dim %lld  kv heads %lld: "
              "%.2f ms, %.0f GFLOPS, KV %.1f GB/s\n",
              table->name, static_cast<long long>(rows), static_cast<long long>(context), static_cast<long long>(group),
              static_cast<long long>(head_dim), static_cast<long long>(kv_heads), best * 1e3, ops / best * 1e-9,
              static_cast<double>(bytes) / best * 1e-9);
  return 0;
}
