#include "ops/host_experts.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 20;
constexpr int64_t kRowsOfChunk = 16;

void require(bool condition, const char* field, const char* what) {
  if (!condition) throw std::invalid_argument(std::string(field) + ": " + what);
}

void check_bias(const char* field, const Weight* bias, const Weight& of) {
  if (bias == nullptr) return;
  require(bias->experts() == 1 && !bias->mapped(), field, "must be one matrix in memory");
  require(bias->rows() == of.experts() && bias->cols() == of.expert_rows(), field, "must be [experts, rows of an expert]");
}

void check(const HostLayer& l) {
  require(l.gate != nullptr && l.up != nullptr && l.down != nullptr, "weights", "must not be None");
  require(!l.gate->mapped() && !l.up->mapped() && !l.down->mapped(), "weights", "must be in memory");
  require(!l.gate->is_cut() && !l.up->is_cut() && !l.down->is_cut(), "weights", "must not be cut for nodes");
  const KernelTable* table = &l.gate->table();
  require(&l.up->table() == table && &l.down->table() == table, "weights", "are packed for different tables");
  require(l.up->rows() == l.gate->rows() && l.up->cols() == l.gate->cols(), "up", "differs in shape from gate");
  require(l.up->experts() == l.gate->experts() && l.down->experts() == l.gate->experts(), "weights",
          "differ in their number of experts");
  require(l.down->cols() == l.gate->expert_rows(), "down", "has not the columns that gate has rows");
  check_bias("gate_bias", l.gate_bias.get(), *l.gate);
  check_bias("up_bias", l.up_bias.get(), *l.up);
  check_bias("down_bias", l.down_bias.get(), *l.down);
  require(l.top > 0 && l.top <= 65536, "top", "must be in 1 .. 65536");
  require(l.act != op::Act::kSigmoid, "act", "is none of experts");
}

}  // namespace

HostExperts::HostExperts(std::shared_ptr<ThreadPool> pool, int64_t max_rows)
    : pool_(std::move(pool)), max_rows_(max_rows) {
  require(max_rows > 0 && max_rows <= kMostRows, "max_rows", "must be in 1 .. 2^20");
  tokens_.resize(max_rows);
}

int64_t HostExperts::add(const HostLayer& given) {
  check(given);
  const ThreadPool::Session session(*pool_);
  auto layer = std::make_unique<Layer>();
  layer->given = given;
  op::Experts op{0, 1, 2, 0, 1, 2, op::kNone, op::kNone, op::kNone, given.gate->experts(), given.top,
                 given.act, given.alpha, given.limit, given.weigh_input};
  layer->model.weights = {given.gate, given.up, given.down};
  const auto bias = [&](const std::shared_ptr<const Weight>& weight, int64_t& id) {
    if (weight == nullptr) return;
    id = static_cast<int64_t>(layer->model.weights.size());
    layer->model.weights.push_back(weight);
  };
  bias(given.gate_bias, op.gate_bias);
  bias(given.up_bias, op.up_bias);
  bias(given.down_bias, op.down_bias);
  // Values are written by other ops of a program; here nobody writes x and route.
  const std::vector<int64_t> widths = {given.gate->cols(), 2 * given.top, given.down->expert_rows()};
  layer->values = {{const_cast<float*>(given.x), const_cast<float*>(given.route), given.out}, widths, widths};
  layer->experts = std::make_unique<Experts>(given.gate->table(), layer->model, layer->values, Rows::kTokens, op);
  layer->experts->reserve(memory_, max_rows_, pool_->threads());
  const size_t bytes = layer->experts->activation_bytes() * max_rows_;
  if (activations_.size() < bytes) activations_ = Mapping(bytes);
  layers_.push_back(std::move(layer));
  return static_cast<int64_t>(layers_.size()) - 1;
}

const HostExperts::Layer& HostExperts::checked(int64_t layer, int64_t rows) const {
  require(layer >= 0 && layer < static_cast<int64_t>(layers_.size()), "layer", "is not there");
  require(rows >= 0 && rows <= max_rows_, "rows", "must be in 0 .. max_rows");
  return *layers_[layer];
}

void HostExperts::run(int64_t layer, int64_t rows) {
  const ThreadPool::Session session(*pool_);
  const Layer& l = checked(layer, rows);
  const auto experts = static_cast<float>(l.given.gate->experts());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < l.given.top; ++k) {
      const float chosen = l.given.route[r * 2 * l.given.top + k];
      require(chosen >= -1.0f && chosen < experts && chosen == static_cast<float>(static_cast<int64_t>(chosen)), "route",
              "names an expert that is not there");
    }
  Step step;
  step.batch.tokens = {tokens_.data(), static_cast<size_t>(rows)};
  const RowFunction present = l.experts->make_present(activations_.data(), max_rows_);
  pool_->parallel_for((rows + kRowsOfChunk - 1) / kRowsOfChunk, [&](int64_t i, int) {
    present(step, i * kRowsOfChunk, std::min((i + 1) * kRowsOfChunk, rows));
  });
  l.experts->make_compute(*pool_, activations_.data(), max_rows_, memory_)(step);
}

void* HostExperts::task(int64_t layer, int64_t rows) {
  checked(layer, rows);
  const ThreadPool::Session session(*pool_);
  return &tasks_.try_emplace({layer, rows}, Task{this, layer, rows}).first->second;
}

void HostExperts::run_task(void* task) noexcept {
  const Task& t = *static_cast<const Task*>(task);
  try {
    t.owner->run(t.layer, t.rows);
  } catch (...) {
    const HostLayer& l = t.owner->layers_[t.layer]->given;
    std::fill_n(l.out, t.rows * l.down->expert_rows(), std::numeric_limits<float>::quiet_NaN());
  }
}

}  // namespace kt
