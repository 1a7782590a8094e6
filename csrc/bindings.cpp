// The Python module: pools, weights, experts, limits of the machine.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "ops/digest.h"
#include "ops/host_experts.h"
#include "ops/limits.h"
#include "ops/linear.h"
#include "ops/requantise.h"
#include "weight.h"

namespace py = pybind11;

namespace kt {

const KernelTable& table_of(const std::string& isa) {
  const KernelTable* table = find_table(isa);
  if (table == nullptr) throw std::invalid_argument("isa: '" + isa + "' is not usable here");
  return *table;
}

namespace {

constexpr int kMaxThreads = 1024;

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

std::vector<std::string> names_of(const std::vector<const KernelTable*>& tables) {
  std::vector<std::string> names;
  for (const KernelTable* table : tables) names.emplace_back(table->name);
  return names;
}

std::pair<uintptr_t, uintptr_t> host_task(HostExperts& host, int64_t layer, int64_t rows) {
  return {reinterpret_cast<uintptr_t>(&HostExperts::run_task), reinterpret_cast<uintptr_t>(host.task(layer, rows))};
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.attr("BLOCK_TOKENS") = kBlockTokens;
  m.def("isas", [] { return names_of(usable_tables()); });
  m.def("emulated_isas", [] { return names_of(emulated_tables()); });

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

  py::class_<HostExperts>(m, "HostExperts")
      .def(py::init<std::shared_ptr<ThreadPool>, int64_t>(), py::arg("pool"), py::arg("max_rows"))
      .def("add", &add_layer, py::arg("gate").none(false), py::arg("up").none(false), py::arg("down").none(false),
           py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"), py::arg("top"), py::arg("act"), py::arg("alpha"),
           py::arg("limit"), py::arg("weigh_input"), py::arg("x").noconvert(), py::arg("route").noconvert(),
           py::arg("out").noconvert(), py::keep_alive<1, 13>(), py::keep_alive<1, 14>(), py::keep_alive<1, 15>())
      .def("run", &HostExperts::run, py::arg("layer"), py::arg("rows"), py::call_guard<py::gil_scoped_release>())
      .def("task", &host_task, py::arg("layer"), py::arg("rows"));

  bind_program(m);
}

}  // namespace kt
