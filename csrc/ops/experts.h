// The routed experts of a layer: each expert's gated MLP over the rows that chose it.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/memory.h"
#include "ops/expert_cache.h"
#include "ops/step.h"

namespace kt {

// A piece of gate and up: panels [begin, end) of one expert's share for its rows [first, first + rows), counted among all choices
// sorted by expert.
struct ExpertTask {
  int64_t expert, first, rows, begin, end;
  size_t share;
};

// What the experts of all layers use in turn, made for the largest of them.
struct ExpertsMemory {
  Mapping hidden;                // of each share: the presented input of down, a row for each choice, sorted by expert
  Mapping partial;               // [shares][rows][outputs] of down, where there are several
  std::vector<Mapping> scratch;  // of each thread
  std::vector<int64_t> starts;   // [experts + 1] where each expert's choices begin
  std::vector<int32_t> row;      // [choices] whose choice it is
  std::vector<int32_t> place;    // [rows][top] where each row's choices went
  std::vector<ExpertTask> tasks;    // of each share, one after another
  std::vector<int64_t> task_ends;   // [shares]
  std::vector<ExpertTask> planned;  // of one share
  std::vector<uint8_t*> slots;   // [experts] where a cached layer's chosen experts are
  std::vector<int64_t> missing;  // of them, those that have to be packed
};

// Two fork-joins: gate, up and the activation over pieces of (expert, outputs, rows); then down and the weighted sum over
// pieces of the output's columns, each with all experts, so that what an expert gives is added up while it is in the cache.
// A row's sums are in the order of its own choices, and its products do not depend on other rows: law 1.
//
// Where weights are cut for the nodes of a machine (Cut in weight.h), each node has a share of every expert's hidden
// columns: rows of gate and up, columns of down, and threads that read them from its own memory. What the shares give is
// added in the order of the nodes, in a fork-join more: bits depend on how many there are, but still not on other rows.
class Experts {
 public:
  Experts(const KernelTable& table, const Model& model, const Values& values, Rows rows, const op::Experts& op);

  // Bytes of presented input that one row needs.
  size_t activation_bytes() const { return activation_bytes_; }

  // Grows `memory` to what `max_rows` rows on `threads` threads need.
  void reserve(ExpertsMemory& memory, int64_t max_rows, int threads) const;

  // Presents rows of the input in `activations`, which has max_rows * activation_bytes().
  RowFunction make_present(uint8_t* activations, int64_t max_rows) const;

  // Bytes of one expert when packed; whether experts stay in the model's file.
  size_t unit_bytes() const;
  bool mapped() const { return gate().weight->mapped(); }
  int64_t experts() const { return experts_; }

  // Keep packed experts in `cache`, as units from `first_unit` on. They are mapped.
  void use(ExpertCache& cache, int64_t first_unit);

  // Whose experts the next layer's router, asked with the input of this layer, would choose: they are read ahead.
  void read_ahead(const Weight& router, const Experts& next);

  WholeFunction make_compute(ThreadPool& pool, const uint8_t* activations, int64_t max_rows, ExpertsMemory& memory) const;

 private:
  // One of the three weights of every expert.
  struct Matrix {
    const Weight* weight;
    std::vector<float> bias;  // [experts][rows]; empty: none
    size_t input = 0;         // index in inputs_
    size_t offset = 0;        // in a unit
  };
  // What one node has of all experts; all of it where weights are not cut.
  struct Share {
    Matrix gate, up, down;
    size_t hidden_bytes;   // of one row of down's input
    size_t hidden_before;  // of one row of all shares before
  };
  struct Input {
    Activation activation;
    size_t row_bytes;
    size_t offset;  // of its first row, in units of max_rows bytes
  };
  struct Inputs {
    const uint8_t* of[2];  // rows as inputs_[i] has them
  };

  static Matrix matrix(const Model& model, int64_t weight, int64_t bias, size_t share);
  const Matrix& gate() const { return shares_[0].gate; }
  int64_t outputs() const { return shares_[0].down.weight->expert_rows(); }
  void present_for(Matrix& matrix);
  int64_t rows_of_task() const;
  size_t gathered_bytes() const;
  int64_t gated_floats() const;
  size_t scratch_bytes(int64_t max_rows) const;
  void group(int64_t rows, ExpertsMemory& memory) const;
  void fetch(ThreadPool& pool, int64_t rows, ExpertsMemory& memory) const;
  void announce(int64_t rows) const;
  void plan(int threads, ExpertsMemory& memory) const;
  void plan_share(size_t share, int threads, std::vector<ExpertTask>& tasks, const ExpertsMemory& memory) const;
  uint8_t* hidden(size_t share, int64_t choice, const ExpertsMemory& memory) const;
  Inputs gather(const ExpertTask& task, const uint8_t* activations, int64_t max_rows, const ExpertsMemory& memory,
                uint8_t* scratch) const;
  void gate_and_up(const ExpertTask& task, const Inputs& inputs, float* scratch, ExpertsMemory& memory) const;
  void activate(const float* gate, const float* up, int64_t n, float* y) const;
  int64_t down_panels(int64_t rows, int threads) const;
  void down_and_sum(size_t share, int64_t begin, int64_t end, int64_t rows, const ExpertsMemory& memory, float* scratch) const;
  void add_shares(ThreadPool& pool, int64_t rows, const ExpertsMemory& memory) const;
  void multiply(const Matrix& m, int64_t expert, const ExpertsMemory& memory, const uint8_t* act, int64_t rows, int64_t begin,
                int64_t end, float* y, int64_t ldy) const;

  const KernelTable& table_;
  const Rows rows_;
  const float *x_, *route_;
  float* out_;
  const int64_t cols_, experts_, top_;
  const bool weigh_input_;
  const op::Act act_;
  const float alpha_, limit_;
  std::vector<Share> shares_;
  std::vector<Input> inputs_;
  size_t activation_bytes_ = 0;
  Activation hidden_;        // how down's input is presented
  size_t hidden_bytes_ = 0;  // of one row of it, all shares
  ExpertCache* cache_ = nullptr;
  int64_t first_unit_ = 0;
  const Weight* next_router_ = nullptr;
  const Experts* next_ = nullptr;
};

}  // namespace kt
