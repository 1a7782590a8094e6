// The routed experts of a model's layers, each layer callable alone: those that another device has left to the CPU.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/thread_pool.h"
#include "ops/experts.h"
#include "ops/ops.h"

namespace kt {

// One layer's experts. Their numbers in a route are their places in the weights.
struct HostLayer {
  std::shared_ptr<const Weight> gate, up, down;
  std::shared_ptr<const Weight> gate_bias, up_bias, down_bias;  // null: none
  int64_t top;
  op::Act act;
  float alpha, limit;
  bool weigh_input;
  // The caller's memory, of max_rows rows: a device can copy to it and from it without another copy between.
  const float* x;      // [max_rows][columns of gate]
  const float* route;  // [max_rows][2 * top]: numbers of experts, -1 for one that is not here, then weights
  float* out;          // [max_rows][rows of down of an expert]; zero for a row none of whose experts is here
};

// Memory of a step is shared, so layers run one after the other; a second call waits for the first.
class HostExperts {
 public:
  // std::invalid_argument.
  HostExperts(std::shared_ptr<ThreadPool> pool, int64_t max_rows);
  HostExperts(const HostExperts&) = delete;
  HostExperts& operator=(const HostExperts&) = delete;

  int64_t max_rows() const { return max_rows_; }

  // The layer's number. std::invalid_argument for weights that do not fit together; std::bad_alloc.
  int64_t add(const HostLayer& layer);

  // Computes the first `rows` rows of a layer. std::invalid_argument, with nothing done, for a route to what is not there.
  void run(int64_t layer, int64_t rows);

  // The same as a function of one pointer, for a queue that calls such functions (cudaLaunchHostFunc): run_task with what
  // this returns, which lives as long as this. There nobody can be told of an error: the output is NaN, which the sampler
  // finds.
  void* task(int64_t layer, int64_t rows);
  static void run_task(void* task) noexcept;

 private:
  struct Layer {
    HostLayer given;
    Model model;
    Values values;
    std::unique_ptr<Experts> experts;
  };
  struct Task {
    HostExperts* owner;
    int64_t layer, rows;
  };

  const Layer& checked(int64_t layer, int64_t rows) const;

  const std::shared_ptr<ThreadPool> pool_;
  const int64_t max_rows_;
  std::vector<int32_t> tokens_;  // stands for the tokens of a batch, of which the op asks the number only
  std::vector<std::unique_ptr<Layer>> layers_;
  std::map<std::pair<int64_t, int64_t>, Task> tasks_;  // a map's elements stay where they are
  Mapping activations_;
  ExpertsMemory memory_;
};

}  // namespace kt
