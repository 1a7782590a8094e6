#include "ops/experts.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <iterator>
#include <mutex>
#include <numeric>

#include "ops/rows.h"

namespace kt {
namespace {

// Gathered rows of a task, and the columns of all choices that down computes at once, should stay in the second-level
// cache.
constexpr int64_t kGatherBytes = int64_t{384} << 10;
constexpr int64_t kSumBytes = int64_t{2} << 20;
constexpr int64_t kRowStep = 48;  // a multiple of every table's tile of rows
// Columns of gate and up between product and activation: these floats stay in the first-level cache.
constexpr int64_t kGatedFloats = int64_t{4} << 10;
// A group of a quantised row is 32 elements: two panels.
constexpr int64_t kPanelStep = 2;
constexpr int64_t kChunksPerThread = 8;
// A panel is read for its first row at the cost of computing this many more.
constexpr int64_t kRowsWorthReading = 4;
// With more rows the next layer would be guessed to need most of its experts, which is no news.
constexpr int64_t kRowsReadAhead = 16;
// The place of a choice that is computed elsewhere.
constexpr int32_t kNowhere = -1;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }

void grow(Mapping& memory, size_t bytes) {
  if (memory.size() < bytes) memory = Mapping(bytes);
}

}  // namespace

Experts::Experts(const KernelTable& table, const Model& model, const Values& values, Rows rows, const op::Experts& op)
    : table_(table),
      rows_(rows),
      x_(values.data[op.x]),
      route_(values.data[op.route]),
      out_(values.data[op.out]),
      cols_(values.widths[op.x]),
      experts_(op.experts),
      top_(op.top),
      weigh_input_(op.weigh_input),
      act_(op.act),
      alpha_(op.alpha),
      limit_(op.limit),
      hidden_(table.activation(model.weights[op.down]->format())) {
  const Weight& whole = *model.weights[op.gate];
  for (size_t n = 0; n < (whole.is_cut() ? whole.cut().ends.size() : 1); ++n) {
    Share share{matrix(model, op.gate, op.gate_bias, n), matrix(model, op.up, op.up_bias, n),
                matrix(model, op.down, n == 0 ? op.down_bias : op::kNone, n), 0, hidden_bytes_};
    present_for(share.gate);
    present_for(share.up);
    share.up.offset = align(share.gate.weight->expert_bytes());
    share.down.offset = share.up.offset + align(share.up.weight->expert_bytes());
    share.hidden_bytes = table.activation_bytes(hidden_, share.down.weight->cols());
    hidden_bytes_ += share.hidden_bytes;
    shares_.push_back(std::move(share));
  }
}

// A share of a weight, and of its bias that for its own rows.
Experts::Matrix Experts::matrix(const Model& model, int64_t weight, int64_t bias, size_t share) {
  const Weight& whole = *model.weights[weight];
  Matrix m{whole.is_cut() ? &whole.part(share) : &whole, {}};
  if (bias == op::kNone) return m;
  const Weight& b = *model.weights[bias];
  const int64_t rows = m.weight->expert_rows();
  const int64_t first = whole.is_cut() && !whole.cut().columns && share > 0 ? whole.cut().ends[share - 1] : 0;
  std::vector<float> all(b.cols());
  for (int64_t e = 0; e < b.rows(); ++e) {
    b.row(e, all.data());
    m.bias.insert(m.bias.end(), all.begin() + first, all.begin() + first + rows);
  }
  return m;
}

void Experts::present_for(Matrix& matrix) {
  const Activation activation = table_.activation(matrix.weight->format());
  while (matrix.input < inputs_.size() && inputs_[matrix.input].activation != activation) ++matrix.input;
  if (matrix.input < inputs_.size()) return;
  const size_t row_bytes = table_.activation_bytes(activation, cols_);
  inputs_.push_back({activation, row_bytes, activation_bytes_});
  activation_bytes_ += row_bytes;
}

// ---- memory

int64_t Experts::rows_of_task() const {
  const int64_t fitting = kGatherBytes / static_cast<int64_t>(activation_bytes_) / kRowStep;
  return std::max(fitting, int64_t{1}) * kRowStep;
}

size_t Experts::gathered_bytes() const { return align(activation_bytes_ * rows_of_task()); }

// Gate and up of a task, one after the other.
int64_t Experts::gated_floats() const { return 2 * std::max(kGatedFloats, rows_of_task() * kPanelStep * kPanelRows); }

// A task has its gathered rows, gated_floats(), and one row of the input times its weight; a piece of down its sums.
size_t Experts::scratch_bytes(int64_t max_rows) const {
  const int64_t sums = std::max(kSumBytes, max_rows * top_ * kPanelStep * kPanelRows * int64_t{sizeof(float)});
  return std::max(gathered_bytes() + (gated_floats() + cols_) * sizeof(float), static_cast<size_t>(sums));
}

void Experts::reserve(ExpertsMemory& memory, int64_t max_rows, int threads) const {
  const int64_t choices = max_rows * top_;
  grow(memory.hidden, hidden_bytes_ * choices);
  if (shares_.size() > 1) grow(memory.partial, shares_.size() * max_rows * outputs() * sizeof(float));
  memory.scratch.resize(threads);
  for (Mapping& scratch : memory.scratch) grow(scratch, scratch_bytes(max_rows));
  memory.slots.resize(std::max(memory.slots.size(), static_cast<size_t>(experts_)));
  memory.starts.resize(std::max(memory.starts.size(), static_cast<size_t>(experts_ + 1)));
  memory.row.resize(std::max(memory.row.size(), static_cast<size_t>(choices)));
  memory.place.resize(std::max(memory.place.size(), static_cast<size_t>(choices)));
}

// ---- experts that stay in the model's file

size_t Experts::unit_bytes() const {
  const Matrix& down = shares_[0].down;
  return down.offset + align(down.weight->expert_bytes());
}

void Experts::use(ExpertCache& cache, int64_t first_unit) {
  cache_ = &cache;
  first_unit_ = first_unit;
}

void Experts::read_ahead(const Weight& router, const Experts& next) {
  next_router_ = &router;
  next_ = &next;
}

// Finds the chosen experts, or makes room for them and packs them. All reads are announced before the first is waited
// for, those of the next layer behind them.
void Experts::fetch(ThreadPool& pool, int64_t rows, ExpertsMemory& memory) const {
  const Share& whole = shares_[0];  // what stays in its file is not cut
  memory.missing.clear();
  for (int64_t e = 0; e < experts_; ++e) {
    if (memory.starts[e] == memory.starts[e + 1]) continue;
    memory.slots[e] = cache_->find(first_unit_ + e);
    if (memory.slots[e] == nullptr) memory.missing.push_back(e);
  }
  for (const int64_t e : memory.missing) {
    memory.slots[e] = cache_->take(first_unit_ + e);
    for (const Matrix* m : {&whole.gate, &whole.up, &whole.down}) m->weight->will_need(e);
  }
  if (next_ != nullptr && rows <= kRowsReadAhead) announce(rows);
  const Matrix* const matrices[] = {&whole.gate, &whole.up, &whole.down};
  const auto each = static_cast<int64_t>(std::size(matrices));
  std::mutex mutex;
  std::exception_ptr failure;
  pool.parallel_for(static_cast<int64_t>(memory.missing.size()) * each, [&](int64_t i, int) {
    const int64_t e = memory.missing[i / each];
    const Matrix& m = *matrices[i % each];
    try {
      m.weight->pack_panels(e, 0, m.weight->panels(), memory.slots[e] + m.offset);
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
    m.weight->release(e);
  });
  if (failure == nullptr) return;
  for (const int64_t e : memory.missing) cache_->drop(first_unit_ + e);
  std::rethrow_exception(failure);
}

// A guess needs neither bias nor groups. That the next layer's input has another norm matters little: what goes from layer
// to layer changes slowly (Eliseev and Mazur 2023, https://arxiv.org/abs/2312.17238, section 3.2).
void Experts::announce(int64_t rows) const {
  const Weight& w = *next_router_;
  const Activation kind = table_.activation(w.format());
  const size_t row_bytes = table_.activation_bytes(kind, cols_);
  std::vector<uint8_t> input(row_bytes * rows);
  table_.quantize(kind, x_, cols_, rows, cols_, input.data());
  std::vector<float> logits(rows * w.rows());
  table_.gemm(w.format(), w.packed(), w.rows(), cols_, kind, input.data(), rows, 0, w.panels(), nullptr, logits.data(),
              w.rows());
  std::vector<int64_t> order(w.rows());
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = logits.data() + r * w.rows();
    std::iota(order.begin(), order.end(), int64_t{0});
    std::partial_sort(order.begin(), order.begin() + next_->top_, order.end(),
                      [row](int64_t a, int64_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); });
    for (int64_t i = 0; i < next_->top_; ++i) {
      if (cache_->has(next_->first_unit_ + order[i])) continue;
      const Share& whole = next_->shares_[0];
      for (const Matrix* m : {&whole.gate, &whole.up, &whole.down}) m->weight->will_need(order[i]);
    }
  }
}

// ---- a step

RowFunction Experts::make_present(uint8_t* activations, int64_t max_rows) const {
  return [this, activations, max_rows](const Step&, int64_t begin, int64_t end) {
    if (weigh_input_) return;  // each choice has an input of its own
    for (const Input& input : inputs_)
      table_.quantize(input.activation, x_ + begin * cols_, cols_, end - begin, cols_,
                      activations + input.offset * max_rows + begin * input.row_bytes);
  };
}

WholeFunction Experts::make_compute(ThreadPool& pool, const uint8_t* activations, int64_t max_rows,
                                    ExpertsMemory& memory) const {
  return [this, &pool, activations, max_rows, &memory](const Step& step) {
    const int64_t rows = step.rows(rows_);
    if (rows == 0) return;
    group(rows, memory);
    if (cache_ != nullptr) fetch(pool, rows, memory);
    plan(pool.threads(), memory);
    pool.parallel_for(memory.task_ends, [&](int64_t i, int thread) {
      uint8_t* scratch = memory.scratch[thread].data();
      const ExpertTask& task = memory.tasks[i];
      gate_and_up(task, gather(task, activations, max_rows, memory, scratch),
                  reinterpret_cast<float*>(scratch + gathered_bytes()), memory);
    });
    const int64_t panels = shares_[0].down.weight->panels(), chunk = down_panels(rows, pool.threads());
    const int64_t pieces = ceil_div(panels, chunk);
    std::vector<int64_t> ends(memory.task_ends.size(), pieces);  // of each share
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    pool.parallel_for(ends, [&](int64_t i, int thread) {
      const int64_t begin = i % pieces * chunk;
      down_and_sum(static_cast<size_t>(i / pieces), begin, std::min(begin + chunk, panels), rows, memory,
                   memory.scratch[thread].as<float>());
    });
    if (shares_.size() > 1) add_shares(pool, rows, memory);
  };
}

// Sorts the choices by expert; those of one expert stay in the order of the rows. An expert below 0 is computed elsewhere
// (ops/host_experts.h); a program has none.
void Experts::group(int64_t rows, ExpertsMemory& memory) const {
  std::vector<int64_t>& starts = memory.starts;
  std::fill(starts.begin(), starts.begin() + experts_ + 1, 0);
  const auto chosen = [&](int64_t row, int64_t k) { return static_cast<int64_t>(route_[row * 2 * top_ + k]); };
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < top_; ++k)
      if (chosen(r, k) >= 0) ++starts[chosen(r, k)];
  int64_t end = 0;
  for (int64_t e = 0; e <= experts_; ++e) {
    end += starts[e];
    starts[e] = end;  // where the next expert begins, until each choice below has taken its place
  }
  for (int64_t r = rows - 1; r >= 0; --r)
    for (int64_t k = top_ - 1; k >= 0; --k) {
      if (chosen(r, k) < 0) {
        memory.place[r * top_ + k] = kNowhere;
        continue;
      }
      const int64_t place = --starts[chosen(r, k)];
      memory.row[place] = static_cast<int32_t>(r);
      memory.place[r * top_ + k] = static_cast<int32_t>(place);
    }
}

void Experts::plan(int threads, ExpertsMemory& memory) const {
  memory.tasks.clear();
  memory.task_ends.clear();
  for (size_t share = 0; share < shares_.size(); ++share) {
    plan_share(share, std::max(threads / static_cast<int>(shares_.size()), 1), memory.planned, memory);
    memory.tasks.insert(memory.tasks.end(), memory.planned.begin(), memory.planned.end());
    memory.task_ends.push_back(static_cast<int64_t>(memory.tasks.size()));
  }
}

// The pieces of gate and up: of equal work, the experts with the most rows first.
void Experts::plan_share(size_t share, int threads, std::vector<ExpertTask>& tasks, const ExpertsMemory& memory) const {
  const int64_t panels = shares_[share].gate.weight->panels(), most_rows = rows_of_task();
  tasks.clear();
  int64_t work = 0;
  for (int64_t e = 0; e < experts_; ++e) {
    const int64_t end = memory.starts[e + 1];
    for (int64_t first = memory.starts[e]; first < end; first += most_rows) {
      const int64_t rows = std::min(most_rows, end - first);
      tasks.push_back({e, first, rows, 0, panels, share});
      work += panels * (rows + kRowsWorthReading);
    }
  }
  const int64_t equal = work / (threads * kChunksPerThread);
  const size_t whole = tasks.size();
  for (size_t i = 0; i < whole; ++i) {
    const ExpertTask task = tasks[i];
    const int64_t fair = equal / (task.rows + kRowsWorthReading) / kPanelStep * kPanelStep;
    const int64_t chunk = std::clamp(fair, kPanelStep, std::max(panels, kPanelStep));
    tasks[i].end = std::min(chunk, panels);
    for (int64_t begin = chunk; begin < panels; begin += chunk)
      tasks.push_back({task.expert, task.first, task.rows, begin, std::min(begin + chunk, panels), share});
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const ExpertTask& a, const ExpertTask& b) {
    return a.rows * (a.end - a.begin) > b.rows * (b.end - b.begin);
  });
}

Experts::Inputs Experts::gather(const ExpertTask& task, const uint8_t* activations, int64_t max_rows,
                                const ExpertsMemory& memory, uint8_t* scratch) const {
  Inputs inputs{};
  const int32_t* rows = memory.row.data() + task.first;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    const uint8_t* all = activations + input.offset * max_rows;
    uint8_t* gathered = scratch + input.offset * rows_of_task();
    inputs.of[i] = gathered;
    if (weigh_input_) {
      float* weighed = reinterpret_cast<float*>(scratch + gathered_bytes()) + gated_floats();
      for (int64_t r = 0; r < task.rows; ++r) {
        const float* x = x_ + rows[r] * cols_;
        const float* chosen = route_ + rows[r] * 2 * top_;
        const float weight = chosen[top_ + (std::find(chosen, chosen + top_, static_cast<float>(task.expert)) - chosen)];
        for (int64_t c = 0; c < cols_; ++c) weighed[c] = weight * x[c];
        table_.quantize(input.activation, weighed, cols_, 1, cols_, gathered + r * input.row_bytes);
      }
    } else if (task.rows == 1) {
      inputs.of[i] = all + rows[0] * input.row_bytes;
    } else {
      for (int64_t r = 0; r < task.rows; ++r)
        std::memcpy(gathered + r * input.row_bytes, all + rows[r] * input.row_bytes, input.row_bytes);
    }
  }
  return inputs;
}

void Experts::gate_and_up(const ExpertTask& task, const Inputs& inputs, float* scratch, ExpertsMemory& memory) const {
  const Share& share = shares_[task.share];
  const int64_t outputs = share.gate.weight->expert_rows();
  const int64_t fitting = kGatedFloats / (task.rows * kPanelRows) / kPanelStep * kPanelStep;
  const int64_t step = std::max(fitting, kPanelStep), width = step * kPanelRows;
  float *gate = scratch, *up = scratch + task.rows * width;
  for (int64_t panel = task.begin; panel < task.end; panel += step) {
    const int64_t end = std::min(panel + step, task.end);
    multiply(share.gate, task.expert, memory, inputs.of[share.gate.input], task.rows, panel, end, gate, width);
    multiply(share.up, task.expert, memory, inputs.of[share.up.input], task.rows, panel, end, up, width);
    const int64_t first = panel * kPanelRows, n = std::min(end * kPanelRows, outputs) - first;
    uint8_t* to = hidden(task.share, task.first, memory) + table_.activation_offset(hidden_, first);
    for (int64_t r = 0; r < task.rows; ++r) {
      activate(gate + r * width, up + r * width, n, gate + r * width);
      table_.quantize(hidden_, gate + r * width, width, 1, n, to + r * share.hidden_bytes);
    }
  }
}

// Row `choice` of a share's input of down.
uint8_t* Experts::hidden(size_t share, int64_t choice, const ExpertsMemory& memory) const {
  const Share& s = shares_[share];
  return memory.hidden.data() + s.hidden_before * memory.starts[experts_] + choice * s.hidden_bytes;
}

void Experts::activate(const float* gate, const float* up, int64_t n, float* y) const {
  switch (act_) {
    case op::Act::kGeluTanh: return table_.gelu_tanh_mul(gate, up, n, y);
    case op::Act::kRelu: return table_.relu_mul(gate, up, n, y);
    case op::Act::kSwigluOai: return table_.swiglu_oai(gate, up, n, alpha_, limit_, y);
    default: return table_.silu_mul(gate, up, n, y);  // the others were refused
  }
}

int64_t Experts::down_panels(int64_t rows, int threads) const {
  const int64_t fitting = kSumBytes / (rows * top_ * kPanelRows * int64_t{sizeof(float)});
  const int64_t balanced = ceil_div(shares_[0].down.weight->panels(), threads * kChunksPerThread);
  return std::max(std::min(fitting, balanced), kPanelStep);
}

void Experts::down_and_sum(size_t share, int64_t begin, int64_t end, int64_t rows, const ExpertsMemory& memory,
                           float* scratch) const {
  const int64_t width = (end - begin) * kPanelRows, outputs = this->outputs();
  float* out = shares_.size() == 1 ? out_ : memory.partial.as<float>() + static_cast<int64_t>(share) * rows * outputs;
  for (int64_t e = 0; e < experts_; ++e) {
    const int64_t first = memory.starts[e], chosen = memory.starts[e + 1] - first;
    if (chosen > 0)
      multiply(shares_[share].down, e, memory, hidden(share, first, memory), chosen, begin, end, scratch + first * width,
               width);
  }
  const int64_t column = begin * kPanelRows, n = std::min(end * kPanelRows, outputs) - column;
  std::vector<const float*> given(top_);
  std::vector<float> weights(top_);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t here = 0;
    for (int64_t k = 0; k < top_; ++k) {
      const int32_t place = memory.place[r * top_ + k];
      if (place == kNowhere) continue;
      given[here] = scratch + place * width;
      weights[here++] = weigh_input_ ? 1.0f : route_[r * 2 * top_ + top_ + k];
    }
    float* sum = out + r * outputs + column;
    if (here == 0) {
      std::fill_n(sum, n, 0.0f);
    } else {
      table_.weighted_sum(given.data(), weights.data(), here, n, sum);
    }
  }
}

void Experts::add_shares(ThreadPool& pool, int64_t rows, const ExpertsMemory& memory) const {
  const int64_t floats = rows * outputs();
  const float* partial = memory.partial.as<float>();
  pool.parallel_for(ceil_div(floats, kGatedFloats), [&](int64_t i, int) {
    const int64_t first = i * kGatedFloats, n = std::min(kGatedFloats, floats - first);
    table_.add(partial + first, partial + floats + first, n, out_ + first);
    for (size_t share = 2; share < shares_.size(); ++share)
      table_.add(out_ + first, partial + static_cast<int64_t>(share) * floats + first, n, out_ + first);
  });
}

// y[r][o - 16 begin] for panels [begin, end) of one expert.
void Experts::multiply(const Matrix& m, int64_t expert, const ExpertsMemory& memory, const uint8_t* act, int64_t rows,
                       int64_t begin, int64_t end, float* y, int64_t ldy) const {
  const Weight& w = *m.weight;
  const int64_t first = begin * kPanelRows;
  const float* bias = m.bias.empty() ? nullptr : m.bias.data() + expert * w.expert_rows() + first;
  const uint8_t* packed = cache_ == nullptr ? w.packed(expert) : memory.slots[expert] + m.offset;
  table_.gemm(w.format(), packed + begin * w.panel_bytes(), w.expert_rows() - first, w.cols(),
              table_.activation(w.format()), act, rows, 0, end - begin, bias, y, ldy);
}

}  // namespace kt
