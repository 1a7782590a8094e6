// Program: one step is one call; sampling by itself.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace kt {
namespace {

KvFormat kv_format_of(const std::string& name) {
  if (name == "bf16") return KvFormat::kBF16;
  if (name == "int8") return KvFormat::kInt8;
  if (name == "latent") return KvFormat::kLatent;
  throw std::invalid_argument("kv_format: '" + name + "' is not known");
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
  Sampler(*best_table(), 1, vocab).draw(pool, x, vocab, sampling, drawn);
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

void bind_program(py::module_& m) {
  const auto a = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("sample", &sample, a("logits"), a("temperature"), a("top_k"), a("top_p"), a("min_p"), a("repetition"),
        a("presence"), a("frequency"), a("seed"), a("position"), a("logprobs"), a("history_starts"), a("history"),
        a("history_output"), a("bias_starts"), a("bias_tokens"), a("bias_values"), a("token"), a("logprob"),
        a("top_tokens"), a("top_logprobs"));

  py::class_<Program>(m, "Program")
      .def(py::init(&make_program), py::arg("pool"), py::arg("isa"), py::arg("ops"), py::arg("widths"),
           py::arg("weights"), py::arg("layers"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("blocks"),
           py::arg("max_tokens"), py::arg("max_rows"), py::arg("expert_bytes") = 0, py::arg("kv_format") = "bf16",
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
