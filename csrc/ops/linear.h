// Products of rows with packed weights.
#pragma once
#include <cstdint>
#include <vector>

#include "ops/step.h"

namespace kt {

// y = x @ weight.T by itself, for tests and benchmarks: x is [rows][cols], y [rows][outputs].
void product(ThreadPool& pool, const Weight& weight, const float* x, int64_t rows, bool precise, float* y);

// One or more products of the same input. The input is presented once for each kind of activation that the formats of
// the weights ask for.
class Product {
 public:
  Product(const KernelTable& table, const Model& model, const Values& values, Rows rows, const op::Linear& op);
  Product(const KernelTable& table, const Model& model, const Values& values, Rows rows, const op::Logits& op);

  // Bytes that the presented input of so many rows needs.
  size_t activation_bytes(int64_t max_rows) const;

  // Presents rows of the input in `activations`, which has activation_bytes(max_rows). Read by multiply.
  RowFunction make_quantize(uint8_t* activations, int64_t max_rows) const;

  // The weights, in the order in which each of the pool's threads begins with them.
  ReadAhead read_ahead(int threads) const;

  // One fork-join over chunks of outputs x chunks of rows. Split by output, never along k: law 1.
  WholeFunction make_multiply(ThreadPool& pool, uint8_t* activations, int64_t max_rows) const;

 private:
  struct Part {
    const Weight* weight;
    std::vector<float> bias;  // empty: none
    float* out;
    int64_t stride;  // floats between its rows
    size_t input;    // index in inputs_
  };
  struct Input {
    Activation activation;
    size_t row_bytes;
    size_t offset;  // of its first row, in units of max_rows bytes
  };

  void add(const Model& model, const op::LinearPart& part, const Values& values);
  void multiply(const Step& step, ThreadPool& pool, uint8_t* activations, int64_t max_rows) const;

  const KernelTable& table_;
  const float* x_;
  int64_t cols_;
  Rows rows_;
  float softcap_ = 0.0f;
  std::vector<Part> parts_;
  std::vector<Input> inputs_;
  bool precise_;
  size_t activation_bytes_ = 0;  // of a row of all inputs
  int64_t panels_ = 0;
  size_t packed_bytes_ = 0;
};

}  // namespace kt
