// A compiled model with its KV pool: what runs a step.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/memory.h"
#include "cpu/thread_pool.h"
#include "ops/attention.h"
#include "ops/batch.h"
#include "ops/head_linear.h"
#include "ops/experts.h"
#include "ops/linear.h"
#include "ops/ops.h"
#include "ops/recurrence.h"
#include "ops/sampler.h"
#include "ops/step.h"

namespace kt {

struct ProgramSizes {
  int64_t blocks, max_tokens, max_rows;
  int64_t expert_bytes;  // of packed experts, where they stay in the model's file
  int64_t states;        // places for states, of a model that has them
};

// The ops are compiled once into stages. Row-wise ops that follow each other, and the presenting of a product's input,
// become one pass over chunks of rows: one fork-join, and a row is still in the cache for the next op. Products and
// attention need all rows of what came before, so each ends a pass.
class Program {
 public:
  // std::invalid_argument for a model that does not fit together; std::bad_alloc.
  Program(std::shared_ptr<ThreadPool> pool, const KernelTable& table, Model model, const ProgramSizes& sizes);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // The same model over the same KV, with values of its own: its steps may be done in the middle of one of this program's
  // (`between`). It must not outlive this one. std::invalid_argument where experts stay in a file,
  // whose cache is in use, and where sequences have states.
  std::unique_ptr<Program> within(int64_t max_tokens, int64_t max_rows);

  int64_t block_bytes() const { return kv_->block_bytes(); }
  std::span<uint8_t> block(int64_t block) const { return kv_->block(block); }
  int64_t vocab() const { return rows_.vocab; }

  // The state in slot `source` replaces that in `target`; not beside a step. std::invalid_argument.
  void copy_state(int64_t source, int64_t target);

  // One step: computes all tokens, writes their KV, draws one token for each logit row. std::invalid_argument for an input
  // that does not fit, before anything is touched. Steps exclude each other, but for those of a program `within`, which
  // `between` may do: it is called from time to time in the middle, by the thread that called. A step ends with what it throws.
  void step(const Batch& batch, const Sampling& sampling, const Drawn& drawn, const std::function<void()>& between = {});

  // The same without drawing; logits is [rows][vocab].
  void logits(const Batch& batch, std::span<float> logits);

  // Count the calls and seconds of each op from now on, or no longer. Profiled row-wise ops run each by itself, not fused.
  void set_profiling(bool on);

  // For each op, then for the draw: calls and seconds since profiling was switched on.
  std::vector<std::pair<int64_t, double>> profile();

 private:
  struct RowOp {
    size_t op;
    RowFunction run;
  };
  struct RowPass {
    Rows rows;
    int64_t width;  // floats that a row touches: what decides about chunks
    std::vector<RowOp> ops;
  };
  struct WholeOp {
    size_t op;
    WholeFunction run;
  };
  struct Stage {
    std::variant<RowPass, WholeOp> what;
    const ReadAhead* next = nullptr;  // what the next product reads
  };

  void build_products();
  void build_expert_cache();
  void build_read_ahead(size_t i);
  void build_angles();
  void compile();
  void add_row_op(size_t op, Rows rows, int64_t width, RowFunction run);
  void add_product(size_t op, int64_t width);
  void add_whole(size_t op, WholeFunction run);
  void look_ahead();
  void add(size_t i, const op::Embed& op);
  void add(size_t i, const op::RmsNorm& op);
  void add(size_t i, const op::Linear& op);
  void add(size_t i, const op::Rope& op);
  void add(size_t i, const op::PositionScale& op);
  void add(size_t i, const op::HeadLinear& op);
  void add(size_t i, const op::MlaAttention& op);
  void add(size_t i, const op::Attention& op);
  void add(size_t i, const op::ShortConv& op);
  void add(size_t i, const op::DeltaRule& op);
  void add(size_t i, const op::Gated& op);
  void add(size_t i, const op::Route& op);
  void add(size_t i, const op::Experts& op);
  void add(size_t i, const op::Add& op);
  void add(size_t i, const op::GatherRows& op);
  void add(size_t i, const op::Logits& op);
  int64_t max_rows(Rows rows) const { return rows == Rows::kTokens ? sizes_.max_tokens : sizes_.max_rows; }

  Program(std::shared_ptr<ThreadPool> pool, const KernelTable& table, Model model, const ProgramSizes& sizes,
          std::shared_ptr<KvPool> kv);
  void check(const Batch& batch);
  bool writes(int64_t block) const { return in_step_ && block_writer_[block] == check_number_; }
  void prepare(const Batch& batch);
  void compute(const std::function<void()>& between = {});
  void run_rows(const RowPass& pass);
  template <class F>
  void timed(size_t op, F&& run);

  struct RopeAngles {
    int64_t inv_freq;
    float scale;
    size_t first_op;
    std::vector<float> cos_sin;  // [max_tokens][2 * pairs]
  };

  const std::shared_ptr<ThreadPool> pool_;
  const KernelTable& table_;
  const Model model_;
  const ModelRows rows_;
  const ProgramSizes sizes_;
  const std::shared_ptr<KvPool> kv_;
  StatePool states_;
  Mapping value_memory_, activation_memory_;
  Values values_;
  std::vector<RopeAngles> angles_;
  AttentionMemory attention_memory_;
  std::vector<std::unique_ptr<Product>> products_;  // of each op; null where it is none
  std::vector<std::unique_ptr<HeadProduct>> head_products_;
  std::vector<std::unique_ptr<Experts>> experts_;  // likewise
  ExpertsMemory experts_memory_;
  std::unique_ptr<ExpertCache> expert_cache_;
  std::vector<Stage> stages_;
  Sampler sampler_;

  Step step_;
  std::vector<uint32_t> block_writer_;  // the check that wrote each block last
  uint32_t check_number_ = 0;
  bool in_step_ = false;
  const Program* whole_ = nullptr;  // that this one is within
  bool profiling_ = false;
  std::vector<std::pair<int64_t, double>> profile_;
};

}  // namespace kt
