#include "ops/route.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "ops/rows.h"

namespace kt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The n largest of what is added, largest first; of equals the one added first.
class Best {
 public:
  explicit Best(int64_t n) : n_(n) { kept_.reserve(n + 1); }

  void clear() { kept_.clear(); }
  void add(float score, int64_t id) {
    if (size() == n_ && !(score > kept_.back().first)) return;
    const auto place = std::find_if(kept_.begin(), kept_.end(), [score](const auto& k) { return score > k.first; });
    kept_.insert(place, {score, id});
    if (size() > n_) kept_.pop_back();
  }
  int64_t size() const { return static_cast<int64_t>(kept_.size()); }
  int64_t id(int64_t i) const { return kept_[i].second; }

 private:
  int64_t n_;
  std::vector<std::pair<float, int64_t>> kept_;
};

class Router {
 public:
  Router(const KernelTable& table, const op::Route& op, std::vector<float> bias)
      : table_(table), op_(op), bias_(std::move(bias)), best_(op.top), best_groups_(op.top_groups), p_(op.experts),
        c_(op.experts), sums_(op.experts / kSampleRun + 1), chosen_(op.top) {}

  // out: top numbers of experts, then their weights.
  void row(const float* logits, float* out) {
    score(logits);
    for (int64_t e = 0; e < op_.experts; ++e) {
      const float c = bias_.empty() ? p_[e] : p_[e] + bias_[e];
      c_[e] = std::isnan(c) ? -kInfinity : c;
    }
    choose();
    for (int64_t i = 0; i < op_.top; ++i) {
      out[i] = static_cast<float>(best_.id(i));
      chosen_[i] = p_[best_.id(i)];
    }
    float* weights = out + op_.top;
    if (op_.score == op::Score::kSoftmaxTop) {
      softmax(chosen_.data(), op_.top, weights);
    } else {
      std::copy(chosen_.begin(), chosen_.end(), weights);
    }
    float divisor = 1.0f;
    if (op_.normalise) {
      float sum = 0.0f;
      for (int64_t i = 0; i < op_.top; ++i) sum += weights[i];
      divisor = sum + 1e-20f;
    }
    for (int64_t i = 0; i < op_.top; ++i) weights[i] = weights[i] / divisor * op_.scale;
  }

 private:
  void score(const float* logits) {
    switch (op_.score) {
      case op::Score::kSoftmax: softmax(logits, op_.experts, p_.data()); break;
      case op::Score::kSigmoid:
        table_.exp_logits(logits, op_.experts, 0.0f, -1.0f, p_.data(), sums_.data());
        for (float& p : p_) p = 1.0f / (1.0f + p);
        break;
      case op::Score::kSoftmaxTop: std::copy_n(logits, op_.experts, p_.begin()); break;
    }
  }

  // NaN everywhere if one of x is, or is infinity.
  void softmax(const float* x, int64_t n, float* y) {
    float largest = -kInfinity;
    bool bad = false;
    for (int64_t i = 0; i < n; ++i) {
      bad = bad || std::isnan(x[i]);
      largest = std::max(largest, x[i]);
    }
    if (bad || std::isinf(largest)) {
      std::fill_n(y, n, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    table_.exp_logits(x, n, largest, 1.0f, y, sums_.data());
    float sum = 0.0f;
    for (int64_t run = 0; run * kSampleRun < n; ++run) sum += sums_[run];
    for (int64_t i = 0; i < n; ++i) y[i] /= sum;
  }

  void choose() {
    best_.clear();
    const int64_t members = op_.experts / op_.groups;
    if (op_.groups == 1) {
      add_group(0, members);
      return;
    }
    best_groups_.clear();
    for (int64_t g = 0; g < op_.groups; ++g) best_groups_.add(group_score(c_.data() + g * members, members), g);
    std::vector<int64_t> groups;
    for (int64_t i = 0; i < op_.top_groups; ++i) groups.push_back(best_groups_.id(i));
    std::sort(groups.begin(), groups.end());  // of equal experts the lower number comes first
    for (const int64_t g : groups) add_group(g, members);
  }
  void add_group(int64_t group, int64_t members) {
    for (int64_t e = group * members; e < (group + 1) * members; ++e) best_.add(c_[e], e);
  }
  float group_score(const float* c, int64_t members) const {
    float first = -kInfinity, second = -kInfinity;
    for (int64_t i = 0; i < members; ++i) {
      second = std::max(second, std::min(first, c[i]));
      first = std::max(first, c[i]);
    }
    return op_.group_score == op::GroupScore::kMax ? first : first + second;
  }

  const KernelTable& table_;
  const op::Route& op_;
  const std::vector<float> bias_;
  Best best_, best_groups_;
  std::vector<float> p_, c_, sums_, chosen_;
};

}  // namespace

RowFunction make_route(const KernelTable& table, const Model& model, const Values& values, const op::Route& op) {
  std::vector<float> bias;
  if (op.bias != op::kNone) bias = vector_of(*model.weights[op.bias]);
  return [&table, op, bias = std::move(bias), logits = values.data[op.logits],
          out = values.data[op.out]](const Step&, int64_t begin, int64_t end) {
    Router router(table, op, bias);
    for (int64_t r = begin; r < end; ++r) router.row(logits + r * op.experts, out + r * 2 * op.top);
  };
}

}  // namespace kt
