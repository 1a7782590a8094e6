// From Python's tuples to ops, with errors that say which op and which field.
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace kt {

op::Act act_named(const std::string& where, const std::string& act) {
  if (act == "silu") return op::Act::kSilu;
  if (act == "gelu_tanh") return op::Act::kGeluTanh;
  if (act == "sigmoid") return op::Act::kSigmoid;
  if (act == "relu") return op::Act::kRelu;
  if (act == "swiglu_oai") return op::Act::kSwigluOai;
  throw std::invalid_argument(where + "act: '" + act + "' is not known");
}

namespace {

// The fields of one op in order, each converted with an error that says which it was.
class Fields {
 public:
  Fields(std::string where, const py::tuple& values, size_t next) : where_(std::move(where)), values_(values), next_(next) {}

  template <class T>
  T get(const char* field) {
    if (next_ >= values_.size()) throw std::invalid_argument(where_ + ": " + field + ": is missing");
    try {
      return values_[next_++].cast<T>();
    } catch (const py::cast_error&) {
      throw std::invalid_argument(where_ + ": " + field + ": wrong type");
    }
  }
  void end() const {
    if (next_ != values_.size()) throw std::invalid_argument(where_ + ": too many fields");
  }
  const std::string& where() const { return where_; }

 private:
  std::string where_;
  const py::tuple& values_;
  size_t next_;
};

op::Linear linear_of(Fields& f) {
  op::Linear linear{f.get<int64_t>("x"), {}};
  const auto parts = f.get<std::vector<py::tuple>>("parts");
  for (size_t i = 0; i < parts.size(); ++i) {
    Fields p(f.where() + ": parts[" + std::to_string(i) + "]", parts[i], 0);
    const auto weight = p.get<int64_t>("weight");
    const auto bias = p.get<std::optional<int64_t>>("bias");
    linear.parts.push_back({weight, bias.value_or(op::kNone), p.get<int64_t>("out")});
    p.end();
  }
  linear.precise = f.get<bool>("precise");
  return linear;
}

op::Act act_of(Fields& f) { return act_named(f.where() + ": ", f.get<std::string>("act")); }

op::Score score_of(Fields& f) {
  const auto score = f.get<std::string>("score");
  if (score == "softmax") return op::Score::kSoftmax;
  if (score == "sigmoid") return op::Score::kSigmoid;
  if (score == "softmax_top") return op::Score::kSoftmaxTop;
  throw std::invalid_argument(f.where() + ": score: '" + score + "' is not known");
}

op::GroupScore group_score_of(Fields& f) {
  const auto score = f.get<std::string>("group_score");
  if (score == "max") return op::GroupScore::kMax;
  if (score == "top2") return op::GroupScore::kTop2;
  throw std::invalid_argument(f.where() + ": group_score: '" + score + "' is not known");
}

// Braces evaluate from left to right, so fields are read in order.
Op op_of(const std::string& kind, Fields& f) {
  const auto id = [&f](const char* field) { return f.get<int64_t>(field); };
  const auto optional = [&f](const char* field) { return f.get<std::optional<int64_t>>(field).value_or(op::kNone); };
  const auto number = [&f](const char* field) { return f.get<float>(field); };
  if (kind == "Embed") return op::Embed{id("table"), id("out"), number("scale")};
  if (kind == "RmsNorm") return op::RmsNorm{id("x"), id("weight"), id("out"), id("group"), number("eps")};
  if (kind == "Linear") return linear_of(f);
  if (kind == "Rope")
    return op::Rope{id("x"),           id("heads"), id("head_dim"), id("inv_freq"), f.get<bool>("interleaved"),
                    number("scale"), id("offset")};
  if (kind == "HeadLinear") return op::HeadLinear{id("x"), id("weight"), id("out"), id("heads")};
  if (kind == "MlaAttention")
    return op::MlaAttention{id("q_latent"), id("q"),     id("latent"), id("rope"),
                            id("out"),      id("layer"), id("heads"),  number("scale")};
  if (kind == "ShortConv") return op::ShortConv{id("x"), id("weight"), id("out"), id("layer")};
  if (kind == "DeltaRule")
    return op::DeltaRule{id("qkv"),   id("a"),       id("b"),       id("decay"), id("bias"), id("out"),
                         id("layer"), id("k_heads"), id("v_heads"), id("k_dim"), id("v_dim")};
  if (kind == "PositionScale") return op::PositionScale{id("x"), id("span"), number("scale")};
  if (kind == "Attention")
    return op::Attention{id("q"),           id("k"),           id("v"),        id("out"),       id("layer"),
                         id("heads"),       id("kv_heads"),    id("head_dim"), number("scale"), id("window"),
                         number("softcap"), optional("sinks"), id("chunk")};
  if (kind == "Gated") return op::Gated{id("gate"), id("up"), id("out"), act_of(f)};
  if (kind == "Route")
    return op::Route{id("logits"), optional("bias"),  id("out"),         id("experts"),           id("top"),      score_of(f),
                     id("groups"), id("top_groups"), group_score_of(f), f.get<bool>("normalise"), number("scale")};
  if (kind == "Experts")
    return op::Experts{id("x"),         id("route"),           id("out"),           id("gate"),
                       id("up"),        id("down"),            optional("gate_bias"), optional("up_bias"),
                       optional("down_bias"), id("experts"),   id("top"),           act_of(f),
                       number("alpha"), number("limit"),       f.get<bool>("weigh_input")};
  if (kind == "Add") return op::Add{id("a"), id("b"), id("out")};
  if (kind == "GatherRows") return op::GatherRows{id("x"), id("out")};
  if (kind == "Logits") return op::Logits{id("x"), id("weight"), id("out"), number("softcap"), f.get<bool>("precise")};
  throw std::invalid_argument(f.where() + ": unknown kind");
}

}  // namespace

std::vector<Op> ops_of(const std::vector<py::tuple>& tuples) {
  std::vector<Op> ops;
  for (const py::tuple& values : tuples) {
    const std::string where = "op " + std::to_string(ops.size());
    Fields first(where, values, 0);
    const auto kind = first.get<std::string>("kind");
    Fields f(where + " (" + kind + ")", values, 1);
    ops.push_back(op_of(kind, f));
    f.end();
  }
  return ops;
}

}  // namespace kt
