#include <cmath>
#include <stdexcept>
#include <string>

#include "ops/ops.h"

namespace kt {
namespace {

constexpr int64_t kMaxWidth = int64_t{1} << 31;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxExperts = 65536;
constexpr int64_t kMaxStateSize = int64_t{1} << 20;

class Checker {
 public:
  Checker(const Model& model, size_t nodes)
      : model_(model), nodes_(nodes), values_(model.widths.size(), Rows::kUnset), routes_(model.widths.size()) {
    result_.token_rows.resize(model.widths.size(), false);
  }

  ModelRows run() {
    require(model_.cache.layers > 0 && model_.cache.kv_heads > 0, "cache", "layers and kv_heads must be positive");
    check_head_dim("cache.head_dim", model_.cache.head_dim);
    require(model_.cache.format != KvFormat::kLatent || model_.cache.kv_heads == 1, "cache.kv_heads",
            "of latent rows must be 1");
    for (int64_t width : model_.widths) require(width > 0 && width < kMaxWidth, "widths", "must be positive");
    for (const auto& weight : model_.weights) require(weight != nullptr, "weights", "must not be None");
    layer_used_.resize(model_.cache.layers, false);
    check_state();
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
    routes_[value] = {};
    if (rows == Rows::kTokens) result_.token_rows[value] = true;
  }
  const Weight& weight(const std::string& field, int64_t id) const {
    if (id < 0 || id >= static_cast<int64_t>(model_.weights.size()))
      fail(field, "weight " + std::to_string(id) + " of " + std::to_string(model_.weights.size()));
    return *model_.weights[id];
  }
  void check_shape(const std::string& field, int64_t id, int64_t rows, int64_t cols, int64_t experts = 1,
                   bool may_be_cut = false) const {
    const Weight& w = weight(field, id);
    require(experts > 1 || !w.mapped(), field, "must not stay in its file");
    require(may_be_cut || !w.is_cut(), field, "must not be cut");
    if (w.experts() != experts)
      fail(field, "weight " + std::to_string(id) + " has " + std::to_string(w.experts()) + " experts, expected " +
                      std::to_string(experts));
    if (w.rows() != rows || w.cols() != cols)
      fail(field, "weight " + std::to_string(id) + " is " + std::to_string(w.rows()) + " x " + std::to_string(w.cols()) +
                      ", expected " + std::to_string(rows) + " x " + std::to_string(cols));
  }
  void check_head_dim(const char* field, int64_t head_dim) const {
    require(head_dim > 0 && head_dim % kBlockTokens == 0 && head_dim <= kMaxHeadDim, field,
            "must be a multiple of 16, at most 1024");
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
    require(!table.mapped(), "table", "must not stay in its file");
    require(!table.is_cut(), "table", "must not be cut");
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
    require(op.head_dim > 0 && op.head_dim <= kMaxHeadDim, "head_dim", "must be in 1 .. 1024");
    read("x", op.x, Rows::kTokens, checked_product(op.heads, op.head_dim));
    const int64_t pairs = weight("inv_freq", op.inv_freq).cols();
    check_shape("inv_freq", op.inv_freq, 1, pairs);
    require(2 * pairs <= op.head_dim, "inv_freq", "has more pairs than a head");
    require(op.offset >= 0 && op.offset <= op.head_dim - 2 * pairs, "offset", "leaves the head");
    check_number("scale", op.scale, false);
  }

  void check(const op::PositionScale& op) {
    start("PositionScale", Rows::kTokens);
    read("x", op.x, Rows::kTokens, width("x", op.x));
    require(op.span > 0, "span", "must be positive");
    check_number("scale", op.scale, false);
  }

  void check(const op::HeadLinear& op) {
    const Rows rows = enter("HeadLinear", "x", op.x);
    require(op.heads > 0 && width("x", op.x) % op.heads == 0, "heads", "must divide the width of x");
    const Weight& w = weight("weight", op.weight);
    check_shape("weight", op.weight, w.rows(), w.cols(), op.heads);
    require(w.cols() <= width("x", op.x) / op.heads, "weight", "has more columns than a head has elements");
    require(op.out != op.x, "out", "must not be x");
    write("out", op.out, rows, w.rows());
  }

  void check(const op::MlaAttention& op) {
    start("MlaAttention", Rows::kTokens);
    use_layer(op.layer);
    require(model_.cache.format == KvFormat::kLatent, "latent", "the cache has none");
    require(op.heads > 0, "heads", "must be positive");
    const int64_t latent = width("latent", op.latent), rope = width("rope", op.rope), q = width("q", op.q);
    require(latent % kBlockTokens == 0 && rope % kBlockTokens == 0, "latent", "and rope must be multiples of 16 wide");
    require(latent + rope == model_.cache.head_dim, "latent", "and rope differ from the cache");
    read("latent", op.latent, Rows::kTokens, latent);
    read("rope", op.rope, Rows::kTokens, rope);
    read("q_latent", op.q_latent, Rows::kTokens, checked_product(op.heads, latent));
    read("q", op.q, Rows::kTokens, q);
    require(q % op.heads == 0 && q / op.heads >= rope, "q", "has no rope part in each head");
    require(op.out != op.q_latent && op.out != op.q, "out", "must not be a query");
    check_number("scale", op.scale, false);
    write("out", op.out, Rows::kTokens, op.heads * latent);
  }

  void use_layer(int64_t layer) {
    require(layer >= 0 && layer < model_.cache.layers, "layer", "is not in the cache");
    require(!layer_used_[layer], "layer", "is used by an attention before");
    layer_used_[layer] = true;
  }

  void check_state() {
    const StateShape& s = model_.state;
    if (s.layers == 0) return;
    const auto inside = [](int64_t x, int64_t most) { return x > 0 && x <= most; };
    require(inside(s.layers, kMaxStateSize) && inside(s.tail, kMaxTaps - 1) && inside(s.conv, kMaxStateSize) &&
                inside(s.heads, kMaxStateSize) && inside(s.k_dim, kMaxHeadDim) && inside(s.v_dim, kMaxHeadDim),
            "state", "is out of range");
    conv_used_.resize(s.layers, false);
    delta_used_.resize(s.layers, false);
  }

  void use_state(std::vector<bool>& used, int64_t layer) {
    require(layer >= 0 && layer < static_cast<int64_t>(used.size()), "layer", "is not in the state");
    require(!used[layer], "layer", "is used by an op of this kind before");
    used[layer] = true;
  }

  void check(const op::ShortConv& op) {
    start("ShortConv", Rows::kTokens);
    use_state(conv_used_, op.layer);
    read("x", op.x, Rows::kTokens, model_.state.conv);
    check_shape("weight", op.weight, model_.state.tail + 1, model_.state.conv);
    require(op.out != op.x, "out", "must not be x");
    write("out", op.out, Rows::kTokens, model_.state.conv);
  }

  void check(const op::DeltaRule& op) {
    start("DeltaRule", Rows::kTokens);
    use_state(delta_used_, op.layer);
    const StateShape& s = model_.state;
    require(op.v_heads == s.heads && op.k_dim == s.k_dim && op.v_dim == s.v_dim, "v_heads",
            "and sizes differ from the state");
    require(op.k_heads > 0 && op.v_heads % op.k_heads == 0, "k_heads", "must divide v_heads");
    read("qkv", op.qkv, Rows::kTokens, 2 * op.k_heads * op.k_dim + op.v_heads * op.v_dim);
    read("a", op.a, Rows::kTokens, op.v_heads);
    read("b", op.b, Rows::kTokens, op.v_heads);
    require(op.a != op.b, "b", "must not be a");
    check_shape("decay", op.decay, 1, op.v_heads);
    check_shape("bias", op.bias, 1, op.v_heads);
    require(op.out != op.qkv && op.out != op.a && op.out != op.b, "out", "must not be an input");
    write("out", op.out, Rows::kTokens, op.v_heads * op.v_dim);
  }

  void check(const op::Attention& op) {
    start("Attention", Rows::kTokens);
    const CacheShape& cache = model_.cache;
    use_layer(op.layer);
    require(cache.format != KvFormat::kLatent, "layer", "has latent rows");
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
    if (op.sinks != op::kNone) check_shape("sinks", op.sinks, 1, op.heads);
    require(op.chunk >= 0, "chunk", "must not be negative");
    write("out", op.out, Rows::kTokens, q_width);
  }

  void check(const op::Gated& op) {
    const Rows rows = enter("Gated", "up", op.up);
    require(op.act != op::Act::kRelu && op.act != op::Act::kSwigluOai, "act", "is one of experts only");
    if (op.act == op::Act::kSigmoid && width("gate", op.gate) == 1) {
      read("gate", op.gate, rows, 1);
      require(op.out != op.gate, "out", "must not be a gate of one element");
    } else {
      read("gate", op.gate, rows, width("up", op.up));
    }
    write("out", op.out, rows, width("up", op.up));
  }

  void check(const op::Route& op) {
    const Rows rows = enter("Route", "logits", op.logits);
    require(op.experts > 0 && op.experts <= kMaxExperts, "experts", "must be in 1 .. 65536");
    require(op.top > 0 && op.top <= op.experts, "top", "must be in 1 .. experts");
    read("logits", op.logits, rows, op.experts);
    if (op.bias != op::kNone) check_shape("bias", op.bias, 1, op.experts);
    require(op.groups > 0 && op.experts % op.groups == 0, "groups", "must divide the experts");
    require(op.top_groups > 0 && op.top_groups <= op.groups, "top_groups", "must be in 1 .. groups");
    require(op.top <= op.experts / op.groups * op.top_groups, "top_groups", "have fewer experts than are chosen");
    require(op.groups == 1 || op.group_score == op::GroupScore::kMax || op.experts >= 2 * op.groups, "group_score",
            "needs two experts in a group");
    check_number("scale", op.scale, false);
    require(op.out != op.logits, "out", "must not be logits");
    write("out", op.out, rows, 2 * op.top);
    routes_[op.out] = {op.experts, op.top};
  }

  void check(const op::Experts& op) {
    const Rows rows = enter("Experts", "x", op.x);
    read("route", op.route, rows, 2 * op.top);
    require(routes_[op.route].experts == op.experts && routes_[op.route].top == op.top, "route",
            "is not a choice of as many of these experts");
    const int64_t in = width("x", op.x), out = width("out", op.out);
    const int64_t hidden = weight("gate", op.gate).expert_rows();
    check_shape("gate", op.gate, op.experts * hidden, in, op.experts, true);
    check_shape("up", op.up, op.experts * hidden, in, op.experts, true);
    check_shape("down", op.down, op.experts * out, hidden, op.experts, true);
    check_cut(op);
    const bool mapped = weight("gate", op.gate).mapped();
    require(weight("up", op.up).mapped() == mapped && weight("down", op.down).mapped() == mapped, "down",
            "must stay in its file as gate and up do, or not");
    if (op.gate_bias != op::kNone) check_shape("gate_bias", op.gate_bias, op.experts, hidden);
    if (op.up_bias != op::kNone) check_shape("up_bias", op.up_bias, op.experts, hidden);
    if (op.down_bias != op::kNone) check_shape("down_bias", op.down_bias, op.experts, out);
    require(op.act != op::Act::kSigmoid, "act", "is none of experts");
    check_number("alpha", op.alpha, false);
    check_number("limit", op.limit, false);
    require(op.out != op.x && op.out != op.route, "out", "must be neither x nor route");
    write("out", op.out, rows, out);
  }

  // All three by the same hidden columns, at whole groups of 32, for the nodes of the pool that computes them.
  void check_cut(const op::Experts& op) const {
    const Weight &gate = weight("gate", op.gate), &up = weight("up", op.up), &down = weight("down", op.down);
    require(gate.cut().ends == up.cut().ends && gate.cut().ends == down.cut().ends, "down", "is cut elsewhere than gate or up");
    if (!gate.is_cut()) return;
    require(!gate.cut().columns && !up.cut().columns && down.cut().columns, "down",
            "must be cut in columns, gate and up in rows");
    require(gate.cut().ends.size() == nodes_, "gate", "is not cut for as many nodes as the threads have");
    for (size_t n = 0; n + 1 < nodes_; ++n)
      require(gate.cut().ends[n] % 32 == 0, "gate", "must be cut at multiples of 32");
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
    const Choice choice = routes_[op.x];
    write("out", op.out, Rows::kLogits, width("x", op.x));
    routes_[op.out] = choice;
  }

  void check(const op::Logits& op) {
    start("Logits", Rows::kLogits);
    const Weight& w = weight("weight", op.weight);
    check_shape("weight", op.weight, w.rows(), w.cols());
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

  struct Choice {
    int64_t experts = 0, top = 0;
  };

  const Model& model_;
  const size_t nodes_;
  std::vector<Rows> values_;
  std::vector<Choice> routes_;  // of each value that a Route wrote last: its numbers are indices
  std::vector<bool> layer_used_, conv_used_, delta_used_;
  ModelRows result_;
  size_t index_ = 0;
  const char* name_ = nullptr;
  bool in_ops_ = false, ended_ = false;
};

}  // namespace

ModelRows check_model(const Model& model, size_t nodes) { return Checker(model, nodes).run(); }

}  // namespace kt
