// The ops of a program, as engine/program.py defines them: names, fields and their meaning are the same.
#pragma once
#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "weight.h"

namespace kt {
namespace op {

inline constexpr int64_t kNone = -1;

struct Embed {
  int64_t table, out;
  float scale;
};
struct RmsNorm {
  int64_t x, weight, out, group;
  float eps;
};
struct LinearPart {
  int64_t weight, bias, out;  // bias may be kNone
};
struct Linear {
  int64_t x;
  std::vector<LinearPart> parts;
  bool precise = false;
};
struct Rope {
  int64_t x, heads, head_dim, inv_freq;
  bool interleaved;
  float scale;
  int64_t offset;
};
struct PositionScale {
  int64_t x, span;
  float scale;
};
struct Attention {
  int64_t q, k, v, out, layer, heads, kv_heads, head_dim;
  float scale;
  int64_t window;
  float softcap;
  int64_t sinks, chunk;  // sinks may be kNone
};
struct HeadLinear {
  int64_t x, weight, out, heads;
};
struct MlaAttention {
  int64_t q_latent, q, latent, rope, out, layer, heads;
  float scale;
};
struct ShortConv {
  int64_t x, weight, out, layer;
};
struct DeltaRule {
  int64_t qkv, a, b, decay, bias, out, layer, k_heads, v_heads, k_dim, v_dim;
};
enum class Act { kSilu, kGeluTanh, kSigmoid, kRelu, kSwigluOai };
struct Gated {
  int64_t gate, up, out;
  Act act;
};
enum class Score { kSoftmax, kSigmoid, kSoftmaxTop };
enum class GroupScore { kMax, kTop2 };
struct Route {
  int64_t logits, bias, out, experts, top;  // bias may be kNone
  Score score;
  int64_t groups, top_groups;
  GroupScore group_score;
  bool normalise;
  float scale;
};
struct Experts {
  int64_t x, route, out, gate, up, down, gate_bias, up_bias, down_bias, experts, top;  // biases may be kNone
  Act act;
  float alpha, limit;
  bool weigh_input;
};
struct Add {
  int64_t a, b, out;
};
struct GatherRows {
  int64_t x, out;
};
struct Logits {
  int64_t x, weight, out;
  float softcap;
  bool precise = false;
};

}  // namespace op

using Op = std::variant<op::Embed, op::RmsNorm, op::Linear, op::Rope, op::PositionScale, op::HeadLinear,
                        op::MlaAttention, op::Attention, op::ShortConv, op::DeltaRule, op::Gated, op::Route,
                        op::Experts, op::Add, op::GatherRows, op::Logits>;

struct CacheShape {
  int64_t layers, kv_heads, head_dim;
  KvFormat format = KvFormat::kBF16;
};

// What a sequence has beside its KV; no layers: nothing.
struct StateShape {
  int64_t layers = 0, tail = 0, conv = 0, heads = 0, k_dim = 0, v_dim = 0;
};

// What the executor is given: ops over numbered values and weights.
struct Model {
  std::vector<Op> ops;
  std::vector<int64_t> widths;  // of each value
  std::vector<std::shared_ptr<const Weight>> weights;
  CacheShape cache;
  StateShape state;
};

// Which rows a value has: one for each token of the step, or one for each row that needs logits.
enum class Rows : uint8_t { kUnset, kTokens, kLogits };

struct ModelRows {
  std::vector<Rows> of_op;       // which rows each op works on (GatherRows: makes)
  std::vector<bool> token_rows;  // for each value: whether it ever has a row for each token
  int64_t vocab = 0;             // rows of the embedding, and logits
};

// Checks every index and shape, so that what runs the model need not. std::invalid_argument names the op and field.
ModelRows check_model(const Model& model, size_t nodes);

}  // namespace kt
