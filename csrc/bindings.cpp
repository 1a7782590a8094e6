// The Python module: converts arguments and releases the GIL; no logic. engine/_kernels.pyi is its documentation.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "ops/digest.h"
#include "ops/host_experts.h"
#include "ops/limits.h"
#include "ops/linear.h"
#include "ops/requantise.h"
#include "program.h"
#include "weight.h"

namespace py = pybind11;

namespace kt {
namespace {

constexpr int kMaxThreads = 1024;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Views of arguments that are bound with noconvert: a silent copy would lose what is written to it.
template <class T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

template <class T>
std::span<T> writable(Array<T>& array) {
  return {array.mutable_data(), static_cast<size_t>(array.size())};
}

const KernelTable& table_of(const std::string& isa) {
  const KernelTable* table = find_table(isa);
  if (table == nullptr) throw std::invalid_argument("isa: '" + isa + "' is not usable here");
  return *table;
}

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

op::Act act_named(const std::string& where, const std::string& act) {
  if (act == "silu") return op::Act::kSilu;
  if (act == "gelu_tanh") return op::Act::kGeluTanh;
  if (act == "sigmoid") return op::Act::kSigmoid;
  if (act == "relu") return op::Act::kRelu;
  if (act == "swiglu_oai") return op::Act::kSwigluOai;
  throw std::invalid_argument(where + "act: '" + act + "' is not known");
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

std::shared_ptr<ThreadPool> make_pool(int threads, int pretended_nodes) {
  if (threads < 1 || threads > kMaxThreads) throw std::invalid_argument("threads: must be in 1 .. 1024");
  if (pretended_nodes < 0 || pretended_nodes > threads)
    throw std::invalid_argument("pretended_nodes: must be in 0 .. threads");
  return std::make_shared<ThreadPool>(threads, pretended_nodes);
}

std::vector<std::pair<int, std::vector<int>>> thread_places(const std::string& root, const std::vector<int>& cpus,
                                                            int threads) {
  const std::vector<NumaNode> nodes = numa_nodes(cpus, root);
  if (threads < static_cast<int>(nodes.size()) || threads > kMaxThreads)
    throw std::invalid_argument("threads: must be one for each node at least");
  std::vector<std::pair<int, std::vector<int>>> places;
  for (ThreadPlace& place : place_threads(nodes, threads))
    places.emplace_back(nodes[place.node].number, std::move(place.cpus));
  return places;
}

std::shared_ptr<Weight> pack(ThreadPool& pool, const std::string& isa, int32_t format, int64_t rows, int64_t cols,
                             const Array<uint8_t>& data) {
  const KernelTable& table = table_of(isa);
  const std::span<const uint8_t> bytes = view(data);
  const py::gil_scoped_release release;
  auto weight = std::make_shared<Weight>(table, static_cast<Format>(format), rows, cols, 1);
  weight->pack(pool, 0, bytes.data(), bytes.size());
  return weight;
}

std::shared_ptr<Weight> pack_experts(ThreadPool& pool, const std::string& isa, int32_t format, int64_t rows, int64_t cols,
                                     int64_t experts, const std::function<Array<uint8_t>(int64_t)>& read,
                                     const std::optional<std::pair<bool, std::vector<int64_t>>>& cut) {
  const KernelTable& table = table_of(isa);
  const auto number = static_cast<Format>(format);
  auto weight = cut ? std::make_shared<Weight>(table, number, rows, cols, experts, Cut{cut->first, cut->second}, pool.nodes())
                    : std::make_shared<Weight>(table, number, rows, cols, experts);
  for (int64_t e = 0; e < experts; ++e) {
    const Array<uint8_t> data = read(e);
    const std::span<const uint8_t> bytes = view(data);
    const py::gil_scoped_release release;
    weight->pack(pool, e, bytes.data(), bytes.size());
  }
  return weight;
}

std::shared_ptr<Weight> map_experts(const std::string& isa, int32_t format, int64_t rows, int64_t cols,
                                    const std::vector<Array<uint8_t>>& data) {
  std::vector<const uint8_t*> sources;
  for (const Array<uint8_t>& one : data) {
    if (one.size() != data[0].size()) throw std::invalid_argument("data: differ in size");
    sources.push_back(one.data());
  }
  const size_t size = data.empty() ? 0 : static_cast<size_t>(data[0].size());
  return std::make_shared<Weight>(table_of(isa), static_cast<Format>(format), rows, cols, std::move(sources), size);
}

// Calls to Python, from threads that do not hold the GIL; what they return is freed by such, too.
std::shared_ptr<const uint8_t> made_by(const py::function& read, int64_t expert, size_t size) {
  const py::gil_scoped_acquire gil;
  try {
    auto data = read(expert).cast<Array<uint8_t>>();
    if (static_cast<size_t>(data.size()) != size)
      throw std::invalid_argument("data: " + std::to_string(data.size()) + " bytes, expected " + std::to_string(size));
    const uint8_t* bytes = data.data();
    const auto free = [](Array<uint8_t>* array) {
      const py::gil_scoped_acquire held;
      delete array;
    };
    const std::shared_ptr<Array<uint8_t>> owner(new Array<uint8_t>(std::move(data)), free);
    return {owner, bytes};
  } catch (const py::error_already_set& error) {
    throw std::runtime_error(std::string("expert ") + std::to_string(expert) + ": " + error.what());
  }
}

std::shared_ptr<Weight> make_experts(const std::string& isa, int32_t format, int64_t rows, int64_t cols, int64_t experts,
                                     py::function read) {
  if (experts < 1 || rows % experts != 0) throw std::invalid_argument("experts: do not divide the rows");
  const size_t size = source_bytes(static_cast<Format>(format), rows / experts, cols);
  const auto free = [](py::function* function) {
    const py::gil_scoped_acquire held;
    delete function;
  };
  const std::shared_ptr<py::function> shared(new py::function(std::move(read)), free);
  return std::make_shared<Weight>(table_of(isa), static_cast<Format>(format), rows, cols, experts,
                                  [shared, size](int64_t expert) { return made_by(*shared, expert, size); });
}

py::tuple requantise_rows(ThreadPool& pool, const std::string& isa, int32_t from, int32_t to, int64_t rows, int64_t cols,
                          const Array<uint8_t>& data) {
  const KernelTable& table = table_of(isa);
  const std::span<const uint8_t> bytes = view(data);
  Array<uint8_t> out(source_bytes(static_cast<Format>(to), rows, cols));
  uint8_t* blocks = out.mutable_data();
  Requantised sums;
  {
    const py::gil_scoped_release release;
    sums = requantise(pool, table, static_cast<Format>(from), static_cast<Format>(to), rows, cols, bytes.data(),
                      bytes.size(), blocks);
  }
  return py::make_tuple(std::move(out), sums.error, sums.size);
}

Array<float> weight_row(const Weight& weight, int64_t i) {
  if (weight.mapped()) throw std::invalid_argument("weight: stays in its file");
  if (weight.is_cut()) throw std::invalid_argument("weight: is cut");
  if (i < 0 || i >= weight.rows()) throw std::invalid_argument("i: no such row");
  Array<float> out(weight.cols());
  weight.row(i, out.mutable_data());
  return out;
}

Array<float> gemm(ThreadPool& pool, const std::shared_ptr<Weight>& weight, const Array<float>& x, bool precise) {
  if (weight->experts() != 1) throw std::invalid_argument("weight: has several experts");
  if (x.ndim() != 2 || x.shape(1) != weight->cols()) throw std::invalid_argument("x: must be [n, cols]");
  Array<float> y({x.shape(0), static_cast<py::ssize_t>(weight->rows())});
  const float* in = x.data();
  float* out = y.mutable_data();
  // An output that is never written shows.
  std::fill_n(out, y.size(), std::numeric_limits<float>::quiet_NaN());
  const py::gil_scoped_release release;
  product(pool, *weight, in, x.shape(0), precise, out);
  return y;
}

Array<float> elementwise(const std::string& isa, const std::string& op, const Array<float>& a, const Array<float>& b) {
  const KernelTable& t = table_of(isa);
  if (a.size() != b.size() || a.size() == 0) throw std::invalid_argument("b: must have the elements of a, one or more");
  const int64_t n = a.size();
  Array<float> out(n);
  float* y = out.mutable_data();
  if (op == "rms_norm") {
    t.rms_norm(a.data(), b.data(), n, 1e-6f, y);
  } else if (op == "silu_mul") {
    t.silu_mul(a.data(), b.data(), n, y);
  } else if (op == "gelu_tanh_mul") {
    t.gelu_tanh_mul(a.data(), b.data(), n, y);
  } else if (op == "add") {
    t.add(a.data(), b.data(), n, y);
  } else if (op == "softcap") {
    std::copy_n(a.data(), n, y);
    t.softcap(y, n, b.data()[0]);
  } else {
    throw std::invalid_argument("op: '" + op + "' is not known");
  }
  return out;
}

uint64_t digest_of(ThreadPool& pool, const Array<uint8_t>& data) {
  const std::span<const uint8_t> bytes = view(data);
  const py::gil_scoped_release release;
  return digest(pool, bytes.data(), bytes.size());
}

uint64_t weight_digest(const Weight& weight, ThreadPool& pool) {
  const py::gil_scoped_release release;
  if (weight.is_cut()) {
    constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;
    uint64_t all = 0;
    for (size_t n = 0; n < weight.cut().ends.size(); ++n)
      all = all * kFactor + digest(pool, weight.part(n).packed(), weight.part(n).bytes());
    return all;
  }
  if (!weight.mapped()) return digest(pool, weight.packed(), weight.bytes());
  const std::vector<uint8_t> samples = weight.samples();
  return digest(pool, samples.data(), samples.size());
}

KvFormat kv_format_of(const std::string& name) {
  if (name == "f16") return KvFormat::kF16;
  if (name == "int8") return KvFormat::kInt8;
  if (name == "latent") return KvFormat::kLatent;
  throw std::invalid_argument("kv_format: '" + name + "' is not known");
}

Activation kind_of(const std::string& name) {
  if (name == "int8") return Activation::kInt8;
  if (name == "bf16") return Activation::kBF16;
  if (name == "f32") return Activation::kF32;
  throw std::invalid_argument("kind: '" + name + "' is not known");
}

const char* activation(const std::string& isa, int32_t format) {
  const KernelTable& table = table_of(isa);
  if (table.packed_bytes(static_cast<Format>(format), 1, 256) == 0) throw std::invalid_argument("format: not supported");
  switch (table.activation(static_cast<Format>(format))) {
    case Activation::kInt8:
    case Activation::kInt8FarOut: return "int8";
    case Activation::kBF16: return "bf16";
    case Activation::kF32: return "f32";
  }
  return "";
}

double peak(ThreadPool& pool, const std::string& isa, const std::string& kind, double seconds) {
  const KernelTable& table = table_of(isa);
  const Activation dot = kind_of(kind);
  const py::gil_scoped_release release;
  return measure_peak(pool, table, dot, seconds);
}

double read_rate(ThreadPool& pool, const std::string& isa, int64_t bytes, double seconds) {
  constexpr int64_t kMostBytes = int64_t{1} << 40;
  if (bytes < 1 || bytes > kMostBytes) throw std::invalid_argument("bytes: must be in 1 .. 2^40");
  const KernelTable& table = table_of(isa);
  const py::gil_scoped_release release;
  return measure_read(pool, table, bytes, seconds);
}

using Optional = std::shared_ptr<Weight>;

int64_t add_layer(HostExperts& host, std::shared_ptr<Weight> gate, std::shared_ptr<Weight> up, std::shared_ptr<Weight> down,
                  const Optional& gate_bias, const Optional& up_bias, const Optional& down_bias, int64_t top,
                  const std::string& act, float alpha, float limit, bool weigh_input, const Array<float>& x,
                  const Array<float>& route, Array<float>& out) {
  const auto is = [&host](const Array<float>& a, int64_t cols) {
    return a.ndim() == 2 && a.shape(0) == host.max_rows() && a.shape(1) == cols;
  };
  if (!is(x, gate->cols())) throw std::invalid_argument("x: must be [max_rows, columns of gate]");
  if (!is(route, 2 * top)) throw std::invalid_argument("route: must be [max_rows, 2 * top]");
  if (!is(out, down->expert_rows())) throw std::invalid_argument("out: must be [max_rows, rows of an expert's down]");
  const HostLayer layer{std::move(gate), std::move(up), std::move(down), gate_bias, up_bias, down_bias, top,
                        act_named("", act), alpha, limit, weigh_input, x.data(), route.data(), out.mutable_data()};
  const py::gil_scoped_release release;
  return host.add(layer);
}

std::pair<uintptr_t, uintptr_t> host_task(HostExperts& host, int64_t layer, int64_t rows) {
  return {reinterpret_cast<uintptr_t>(&HostExperts::run_task), reinterpret_cast<uintptr_t>(host.task(layer, rows))};
}

// The arrays of a step, in the order of the Python signature.
using I32 = Array<int32_t>;
using I64 = Array<int64_t>;
using F32 = Array<float>;

Batch batch_of(const I32& tokens, const I32& starts, const I32& context, const I32& block_starts, const I32& blocks,
               const I32& logit_rows, const I32& slots, const I32& keep_slots, const I32& keep_at) {
  return {view(tokens), view(starts), view(context),    view(block_starts), view(blocks), view(logit_rows),
          view(slots),  view(keep_slots), view(keep_at)};
}

Sampling sampling_of(const F32& temperature, const I32& top_k, const F32& top_p, const F32& min_p,
                     const F32& repetition, const F32& presence, const F32& frequency, const I64& seed,
                     const I64& position, const I32& logprobs, const I32& history_starts, const I32& history,
                     const I32& history_output, const I32& bias_starts, const I32& bias_tokens,
                     const F32& bias_values) {
  return {view(temperature), view(top_k),    view(top_p),    view(min_p),          view(repetition), view(presence),
          view(frequency),   view(seed),     view(position), view(logprobs),       view(history_starts), view(history),
          view(history_output), view(bias_starts), view(bias_tokens), view(bias_values)};
}

Drawn drawn_of(I32& token, F32& logprob, I32& top_tokens, F32& top_logprobs) {
  return {writable(token), writable(logprob), writable(top_tokens), writable(top_logprobs)};
}

void sample(const F32& logits, const F32& temperature, const I32& top_k, const F32& top_p, const F32& min_p,
            const F32& repetition, const F32& presence, const F32& frequency, const I64& seed, const I64& position,
            const I32& logprobs, const I32& history_starts, const I32& history, const I32& history_output,
            const I32& bias_starts, const I32& bias_tokens, const F32& bias_values, I32 token, F32 logprob,
            I32 top_tokens, F32 top_logprobs) {
  if (logits.ndim() != 2 || logits.shape(1) < 1) throw std::invalid_argument("logits: must be [rows, vocab]");
  const Sampling sampling =
      sampling_of(temperature, top_k, top_p, min_p, repetition, presence, frequency, seed, position, logprobs,
                  history_starts, history, history_output, bias_starts, bias_tokens, bias_values);
  const Drawn drawn = drawn_of(token, logprob, top_tokens, top_logprobs);
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  const float* x = logits.data();
  const py::gil_scoped_release release;
  check_sampling(sampling, drawn, rows, vocab);
  ThreadPool pool(1);
  Sampler(*best_table(), 1, vocab).draw(pool, x, sampling, drawn);
}

std::unique_ptr<Program> make_program(std::shared_ptr<ThreadPool> pool, const std::string& isa,
                                      const std::vector<py::tuple>& ops, std::vector<int64_t> widths,
                                      const std::vector<std::shared_ptr<Weight>>& weights, int64_t layers,
                                      int64_t kv_heads, int64_t head_dim, int64_t blocks, int64_t max_tokens,
                                      int64_t max_rows, int64_t expert_bytes, const std::string& kv_format,
                                      const std::optional<std::array<int64_t, 6>>& state, int64_t state_slots) {
  const CacheShape cache{layers, kv_heads, head_dim, kv_format_of(kv_format)};
  StateShape shape;
  if (state.has_value()) shape = {(*state)[0], (*state)[1], (*state)[2], (*state)[3], (*state)[4], (*state)[5]};
  Model model{ops_of(ops), std::move(widths), {weights.begin(), weights.end()}, cache, shape};
  const py::gil_scoped_release release;
  return std::make_unique<Program>(std::move(pool), table_of(isa), std::move(model),
                                   ProgramSizes{blocks, max_tokens, max_rows, expert_bytes, state_slots});
}

void step(Program& program, const I32& tokens, const I32& starts, const I32& context, const I32& block_starts,
          const I32& blocks, const I32& logit_rows, const I32& slots, const I32& keep_slots, const I32& keep_at,
          const F32& temperature, const I32& top_k, const F32& top_p,
          const F32& min_p, const F32& repetition, const F32& presence, const F32& frequency, const I64& seed,
          const I64& position, const I32& logprobs, const I32& history_starts, const I32& history,
          const I32& history_output, const I32& bias_starts, const I32& bias_tokens, const F32& bias_values, I32 token,
          F32 logprob, I32 top_tokens, F32 top_logprobs, const std::function<void()>& between) {
  const Batch batch = batch_of(tokens, starts, context, block_starts, blocks, logit_rows, slots, keep_slots, keep_at);
  const Sampling sampling =
      sampling_of(temperature, top_k, top_p, min_p, repetition, presence, frequency, seed, position, logprobs,
                  history_starts, history, history_output, bias_starts, bias_tokens, bias_values);
  const Drawn drawn = drawn_of(token, logprob, top_tokens, top_logprobs);
  const py::gil_scoped_release release;
  program.step(batch, sampling, drawn, between);
}

F32 logits(Program& program, const I32& tokens, const I32& starts, const I32& context, const I32& block_starts,
           const I32& blocks, const I32& logit_rows, const I32& slots, const I32& keep_slots, const I32& keep_at) {
  F32 out({logit_rows.size(), static_cast<py::ssize_t>(program.vocab())});
  const Batch batch = batch_of(tokens, starts, context, block_starts, blocks, logit_rows, slots, keep_slots, keep_at);
  const std::span<float> to = writable(out);
  const py::gil_scoped_release release;
  program.logits(batch, to);
  return out;
}

// Blocks are copied beside steps, in other threads: who may touch which block when is the caller's to know.
void read_block(const Program& program, int64_t block, Array<uint8_t> into) {
  const std::span<const uint8_t> from = program.block(block);
  const std::span<uint8_t> to = writable(into);
  if (to.size() != from.size()) throw std::invalid_argument("into: must have block_bytes bytes");
  const py::gil_scoped_release release;
  std::ranges::copy(from, to.begin());
}

void write_block(Program& program, int64_t block, const Array<uint8_t>& data) {
  const std::span<uint8_t> to = program.block(block);
  const std::span<const uint8_t> from = view(data);
  if (to.size() != from.size()) throw std::invalid_argument("data: must have block_bytes bytes");
  const py::gil_scoped_release release;
  std::ranges::copy(from, to.begin());
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.attr("BLOCK_TOKENS") = kBlockTokens;
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const KernelTable* table : usable_tables()) names.emplace_back(table->name);
    return names;
  });

  m.def("emulated_isas", [] {
    const KernelTable* table = emulated_table();
    return table == nullptr ? std::vector<std::string>() : std::vector<std::string>{table->name};
  });

  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(m, "ThreadPool")
      .def(py::init(&make_pool), py::arg("threads"), py::arg("pretended_nodes") = 0)
      .def_property_readonly("threads", &ThreadPool::threads)
      .def_property_readonly("nodes", [](const ThreadPool& pool) { return pool.nodes().size(); });
  m.def("thread_places", &thread_places, py::arg("root"), py::arg("cpus"), py::arg("threads"));

  py::class_<Weight, std::shared_ptr<Weight>>(m, "Weight")
      .def_property_readonly("isa", [](const Weight& w) { return w.table().name; })
      .def_property_readonly("format", [](const Weight& w) { return static_cast<int32_t>(w.format()); })
      .def_property_readonly("rows", &Weight::rows)
      .def_property_readonly("cols", &Weight::cols)
      .def_property_readonly("experts", &Weight::experts)
      .def_property_readonly("nbytes", &Weight::bytes)
      .def("digest", &weight_digest, py::arg("pool"))
      .def("row", &weight_row, py::arg("i"));

  m.def("pack", &pack, py::arg("pool"), py::arg("isa"), py::arg("format"), py::arg("rows"), py::arg("cols"),
        py::arg("data").noconvert());
  m.def("pack_experts", &pack_experts, py::arg("pool"), py::arg("isa"), py::arg("format"), py::arg("rows"),
        py::arg("cols"), py::arg("experts"), py::arg("read"), py::arg("cut") = py::none());
  m.def("map_experts", &map_experts, py::arg("isa"), py::arg("format"), py::arg("rows"), py::arg("cols"),
        py::arg("data").noconvert(), py::keep_alive<0, 5>());
  m.def("gemm", &gemm, py::arg("pool"), py::arg("weight"), py::arg("x").noconvert(),
        py::arg("precise") = false);

  m.def("make_experts", &make_experts, py::arg("isa"), py::arg("format"), py::arg("rows"), py::arg("cols"),
        py::arg("experts"), py::arg("read"));
  m.def("requantise", &requantise_rows, py::arg("pool"), py::arg("isa"), py::arg("source"), py::arg("target"),
        py::arg("rows"), py::arg("cols"), py::arg("data").noconvert());
  m.def("digest", &digest_of, py::arg("pool"), py::arg("data").noconvert());

  m.def("elementwise", &elementwise, py::arg("isa"), py::arg("op"), py::arg("a").noconvert(), py::arg("b").noconvert());

  m.def("activation", &activation, py::arg("isa"), py::arg("format"));
  m.def("measure_peak", &peak, py::arg("pool"), py::arg("isa"), py::arg("kind"), py::arg("seconds"));
  m.def("measure_read", &read_rate, py::arg("pool"), py::arg("isa"), py::arg("bytes"), py::arg("seconds"));

  const auto a = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("sample", &sample, a("logits"), a("temperature"), a("top_k"), a("top_p"), a("min_p"), a("repetition"),
        a("presence"), a("frequency"), a("seed"), a("position"), a("logprobs"), a("history_starts"), a("history"),
        a("history_output"), a("bias_starts"), a("bias_tokens"), a("bias_values"), a("token"), a("logprob"),
        a("top_tokens"), a("top_logprobs"));

  py::class_<HostExperts>(m, "HostExperts")
      .def(py::init<std::shared_ptr<ThreadPool>, int64_t>(), py::arg("pool"), py::arg("max_rows"))
      .def("add", &add_layer, py::arg("gate").none(false), py::arg("up").none(false), py::arg("down").none(false),
           py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"), py::arg("top"), py::arg("act"), py::arg("alpha"),
           py::arg("limit"), py::arg("weigh_input"), a("x"), a("route"), a("out"), py::keep_alive<1, 13>(),
           py::keep_alive<1, 14>(), py::keep_alive<1, 15>())
      .def("run", &HostExperts::run, py::arg("layer"), py::arg("rows"), py::call_guard<py::gil_scoped_release>())
      .def("task", &host_task, py::arg("layer"), py::arg("rows"));

  py::class_<Program>(m, "Program")
      .def(py::init(&make_program), py::arg("pool"), py::arg("isa"), py::arg("ops"), py::arg("widths"),
           py::arg("weights"), py::arg("layers"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("blocks"),
           py::arg("max_tokens"), py::arg("max_rows"), py::arg("expert_bytes") = 0, py::arg("kv_format") = "f16",
           py::arg("state") = py::none(), py::arg("state_slots") = 0,
           py::keep_alive<1, 6>())
      .def("within", &Program::within, py::arg("max_tokens"), py::arg("max_rows"), py::keep_alive<0, 1>(),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("block_bytes", &Program::block_bytes)
      .def("read_block", &read_block, py::arg("block"), a("into"))
      .def("write_block", &write_block, py::arg("block"), a("data"))
      .def("copy_state", &Program::copy_state, py::arg("source"), py::arg("target"),
           py::call_guard<py::gil_scoped_release>())
      .def("step", &step, a("tokens"), a("starts"), a("context"), a("block_starts"), a("blocks"), a("logit_rows"),
           a("slots"), a("keep_slots"), a("keep_at"),
           a("temperature"), a("top_k"), a("top_p"), a("min_p"), a("repetition"), a("presence"), a("frequency"),
           a("seed"), a("position"), a("logprobs"), a("history_starts"), a("history"), a("history_output"),
           a("bias_starts"), a("bias_tokens"), a("bias_values"), a("token"), a("logprob"), a("top_tokens"),
           a("top_logprobs"), py::arg("between") = py::none())
      .def("logits", &logits, a("tokens"), a("starts"), a("context"), a("block_starts"), a("blocks"), a("logit_rows"),
           a("slots"), a("keep_slots"), a("keep_at"))
      .def("set_profiling", &Program::set_profiling, py::arg("on"), py::call_guard<py::gil_scoped_release>())
      .def("profile", &Program::profile);
}

}  // namespace kt
