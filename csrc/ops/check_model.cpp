#include <cmath>
#include <stdexcept>
#include <string>

#include "ops/ops.h"

namespace kt {
namespace {

constexpr int64_t kMaxWidth = int64_t{1} << 31;
constexpr int64_t kMaxHeadDim = 512;

class Checker {
 public:
  explicit Checker(const Model& model) : model_(model), values_(model.widths.size(), Rows::kUnset) {
    result_.token_rows.resize(model.widths.size(), false);
  }

  ModelRows run() {
    require(model_.cache.layers > 0 && model_.cache.kv_heads > 0, "cache", "layers and kv_heads must be positive");
    check_head_dim("cache.head_dim", model_.cache.head_dim);
    for (int64_t width : model_.widths) require(width > 0 && width < kMaxWidth, "widths", "must be positive");
    for (const auto& weight : model_.weights) require(weight != nullptr, "weights", "must not be None");
    layer_used_.resize(model_.cache.layers, false);
    in_ops_ = true;
    for (index_ = 0; index_ < model_.ops.size(); ++index_) {
      name_ = nullptr;
      require(!ended_, "kind", "nothing may follow Logits");
      std::visit([this](const auto& op) { check(op); }, model_.ops[index_]);
    }
    in_ops_ = false;
    require(ended_, "ops", "the last must be Logits");
    return result_;
  }

 private:
  [[noreturn]] void fail(const std::string& field, const std::string& what) const {
    std::string where = "program";
    if (in_ops_) where = "op " + std::to_string(index_) + (name_ ? " (" + std::string(name_) + ")" : "");
    throw std::invalid_argument(where + ": " + field + ": " + what);
  }
  void require(bool condition, const std::string& field, const std::string& what) const {
    if (!condition) fail(field, what);
  }

  void start(const char* name, Rows rows) {
    name_ = name;
    result_.of_op.push_back(rows);
  }
  int64_t width(const std::string& field, int64_t value) const {
    if (value < 0 || value >= static_cast<int64_t>(values_.size()))
      fail(field, "value " + std::to_string(value) + " of " + std::to_string(values_.size()));
    return model_.widths[value];
  }
  Rows rows_of(const std::string& field, int64_t value) const {
    width(field, value);
    require(values_[value] != Rows::kUnset, field, "value " + std::to_string(value) + " is read before it is written");
    return values_[value];
  }
  void check_width(const std::string& field, int64_t value, int64_t expected) const {
    if (width(field, value) != expected)
      fail(field, "value " + std::to_string(value) + " has width " + std::to_string(model_.widths[value]) +
                      ", expected " + std::to_string(expected));
  }
  void read(const std::string& field, int64_t value, Rows rows, int64_t expected) const {
    require(rows_of(field, value) == rows, field, "mixes rows of tokens with rows of logits");
    check_width(field, value, expected);
  }
  void write(const std::string& field, int64_t value, Rows rows, int64_t expected) {
    check_width(field, value, expected);
    values_[value] = rows;
    if (rows == Rows::kTokens) result_.token_rows[value] = true;
  }
  const Weight& weight(const std::string& field, int64_t id) const {
    if (id < 0 || id >= static_cast<int64_t>(model_.weights.size()))
      fail(field, "weight " + std::to_string(id) + " of " + std::to_string(model_.weights.size()));
    return *model_.weights[id];
  }
  void check_shape(const std::string& field, int64_t id, int64_t rows, int64_t cols) const {
    const Weight& w = weight(field, id);
    if (w.rows() != rows || w.cols() != cols)
      fail(field, "weight " + std::to_string(id) + " is " + std::to_string(w.rows()) + " x " + std::to_string(w.cols()) +
                      ", expected " + std::to_string(rows) + " x " + std::to_string(cols));
  }
  void check_head_dim(const char* field, int64_t head_dim) const {
    require(head_dim > 0 && head_dim % kBlockTokens == 0 && head_dim <= kMaxHeadDim, field,
            "must be a multiple of 16, at most 512");
  }
  void check_number(const char* field, float x, bool positive) const {
    require(std::isfinite(x) && (!positive || x > 0), field, positive ? "must be positive and finite" : "must be finite");
  }
  void check_softcap(float x) const {
    require(std::isfinite(x) && x >= 0, "softcap", "must not be negative");
  }

  void check(const op::Embed& op) {
    start("Embed", Rows::kTokens);
    const Weight& table = weight("table", op.table);
    require(result_.vocab == 0 || result_.vocab == table.rows(), "table", "differs in rows from another Embed");
    result_.vocab = table.rows();
    check_number("scale", op.scale, false);
    write("out", op.out, Rows::kTokens, table.cols());
  }

  void check(const op::RmsNorm& op) {
    const Rows rows = enter("RmsNorm", "x", op.x);
    require(op.group > 0 && width("x", op.x) % op.group == 0, "group", "must divide the width of x");
    check_shape("weight", op.weight, 1, op.group);
    require(std::isfinite(op.eps) && op.eps >= 0, "eps", "must not be negative");
    write("out", op.out, rows, width("x", op.x));
  }

  void check(const op::Linear& op) {
    const Rows rows = enter("Linear", "x", op.x);
    require(!op.parts.empty(), "parts", "must not be empty");
    for (size_t i = 0; i < op.parts.size(); ++i) {
      const op::LinearPart& part = op.parts[i];
      const std::string at = "parts[" + std::to_string(i) + "].";
      const int64_t outputs = weight(at + "weight", part.weight).rows();
      check_shape(at + "weight", part.weight, outputs, width("x", op.x));
      if (part.bias != op::kNone) check_shape(at + "bias", part.bias, 1, outputs);
      require(part.out != op.x, at + "out", "must not be x");
      for (size_t j = 0; j < i; ++j) require(part.out != op.parts[j].out, at + "out", "is written twice");
      write(at + "out", part.out, rows, outputs);
    }
  }

  void check(const op::Rope& op) {
    start("Rope", Rows::kTokens);
    require(op.heads > 0, "heads", "must be positive");
    require(op.head_dim > 0 && op.head_dim <= kMaxHeadDim, "head_dim", "must be in 1 .. 512");
    read("x", op.x, Rows::kTokens, checked_product(op.heads, op.head_dim));
    const int64_t pairs = weight("inv_freq", op.inv_freq).cols();
    check_shape("inv_freq", op.inv_freq, 1, pairs);
    require(2 * pairs <= op.head_dim, "inv_freq", "has more pairs than a head");
    require(op.offset >= 0 && op.offset <= op.head_dim - 2 * pairs, "offset", "leaves the head");
    check_number("scale", op.scale, false);
  }

  void check(const op::Attention& op) {
    start("Attention", Rows::kTokens);
    const CacheShape& cache = model_.cache;
    require(op.layer >= 0 && op.layer < cache.layers, "layer", "is not in the cache");
    require(!layer_used_[op.layer], "layer", "is used by an attention before");
    layer_used_[op.layer] = true;
    require(op.kv_heads == cache.kv_heads, "kv_heads", "differs from the cache");
    require(op.head_dim == cache.head_dim, "head_dim", "differs from the cache");
    require(op.heads > 0 && op.heads % op.kv_heads == 0, "heads", "must be a multiple of kv_heads");
    const int64_t q_width = checked_product(op.heads, op.head_dim);
    read("q", op.q, Rows::kTokens, q_width);
    read("k", op.k, Rows::kTokens, op.kv_heads * op.head_dim);
    read("v", op.v, Rows::kTokens, op.kv_heads * op.head_dim);
    require(op.out != op.q, "out", "must not be q");
    check_number("scale", op.scale, false);
    require(op.window >= 0, "window", "must not be negative");
    check_softcap(op.softcap);
    require(op.sinks == op::kNone, "sinks", "are not supported");
    require(op.chunk == 0, "chunk", "is not supported");
    write("out", op.out, Rows::kTokens, q_width);
  }

  void check(const op::Gated& op) {
    const Rows rows = enter("Gated", "up", op.up);
    if (op.act == op::Act::kSigmoid && width("gate", op.gate) == 1) {
      read("gate", op.gate, rows, 1);
      require(op.out != op.gate, "out", "must not be a gate of one element");
    } else {
      read("gate", op.gate, rows, width("up", op.up));
    }
    write("out", op.out, rows, width("up", op.up));
  }

  void check(const op::Add& op) {
    const Rows rows = enter("Add", "a", op.a);
    read("b", op.b, rows, width("a", op.a));
    write("out", op.out, rows, width("a", op.a));
  }

  void check(const op::GatherRows& op) {
    start("GatherRows", Rows::kLogits);
    read("x", op.x, Rows::kTokens, width("x", op.x));
    require(op.out != op.x, "out", "must not be x");
    write("out", op.out, Rows::kLogits, width("x", op.x));
  }

  void check(const op::Logits& op) {
    start("Logits", Rows::kLogits);
    const Weight& w = weight("weight", op.weight);
    read("x", op.x, Rows::kLogits, w.cols());
    require(w.rows() == result_.vocab, "weight", "has not the rows of the embedding");
    check_softcap(op.softcap);
    write("out", op.out, Rows::kLogits, w.rows());
    ended_ = true;
  }

  Rows enter(const char* name, const char* field, int64_t value) {
    name_ = name;
    const Rows rows = rows_of(field, value);
    result_.of_op.push_back(rows);
    return rows;
  }

  static int64_t checked_product(int64_t a, int64_t b) {
    int64_t product;
    return __builtin_mul_overflow(a, b, &product) ? -1 : product;
  }

  const Model& model_;
  std::vector<Rows> values_;
  std::vector<bool> layer_used_;
  ModelRows result_;
  size_t index_ = 0;
  const char* name_ = nullptr;
  bool in_ops_ = false, ended_ = false;
};

}  // namespace

ModelRows check_model(const Model& model) { return Checker(model).run(); }

}  // namespace kt
