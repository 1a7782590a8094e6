#include "program.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops/route.h"
#include "ops/rows.h"

namespace kt {
namespace {

// Below this many floats a pass is done before other threads would have noticed it.
constexpr int64_t kInlineFloats = 16 << 10;
constexpr int64_t kRowsOfChunk = 16;
constexpr size_t kAlignment = 64;
// Between two calls of `between`: who asks for something urgent waits half of it, and a call costs some microseconds.
constexpr auto kBetween = std::chrono::milliseconds(2);

// Whole lines, an odd number of them: vocabularies are multiples of large powers of two, and rows that far apart would all fall
// into the same few lines of a cache.
int64_t logits_stride(int64_t vocab) { return ((vocab + 15) / 16 | 1) * 16; }

size_t align(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

const ProgramSizes& checked(const ProgramSizes& sizes) {
  if (sizes.max_tokens <= 0 || sizes.max_tokens > 1 << 20) throw std::invalid_argument("max_tokens: out of range");
  if (sizes.max_rows <= 0 || sizes.max_rows > sizes.max_tokens)
    throw std::invalid_argument("max_rows: must be in 1 .. max_tokens");
  if (sizes.blocks <= 0 || sizes.blocks > INT32_MAX) throw std::invalid_argument("blocks: out of range");
  return sizes;
}

}  // namespace

Program::Program(std::shared_ptr<ThreadPool> pool, const KernelTable& table, Model model, const ProgramSizes& sizes)
    : Program(std::move(pool), table, std::move(model), sizes, nullptr) {}

Program::Program(std::shared_ptr<ThreadPool> pool, const KernelTable& table, Model model, const ProgramSizes& sizes,
                 std::shared_ptr<KvPool> kv)
    : pool_(std::move(pool)),
      table_(table),
      model_(std::move(model)),
      rows_(check_model(model_, pool_->nodes().size())),
      sizes_(checked(sizes)),
      kv_(kv != nullptr ? std::move(kv) : std::make_shared<KvPool>(model_.cache, sizes.blocks)),
      attention_memory_(table, model_.ops, model_.widths, pool_->threads()),
      sampler_(table, pool_->threads(), rows_.vocab),
      block_writer_(sizes.blocks),
      profile_(model_.ops.size() + 1) {
  for (size_t i = 0; i < model_.weights.size(); ++i)
    if (&model_.weights[i]->table() != &table)
      throw std::invalid_argument("weights[" + std::to_string(i) + "]: packed for " + model_.weights[i]->table().name +
                                  ", not for " + table.name);
  if (model_.state.layers > 0) states_ = StatePool(model_.state, sizes.states);
  values_.widths = values_.strides = model_.widths;
  values_.strides[std::get<op::Logits>(model_.ops.back()).out] = logits_stride(rows_.vocab);
  size_t bytes = 0;
  std::vector<size_t> offsets;
  for (size_t v = 0; v < model_.widths.size(); ++v) {
    offsets.push_back(bytes);
    const Rows rows = rows_.token_rows[v] ? Rows::kTokens : Rows::kLogits;
    bytes += align(values_.strides[v] * max_rows(rows) * sizeof(float));
  }
  value_memory_ = Mapping(bytes);
  std::memset(value_memory_.data(), 0, bytes);  // no page fault in the first step
  for (const size_t offset : offsets) values_.data.push_back(reinterpret_cast<float*>(value_memory_.data() + offset));
  build_products();
  build_expert_cache();
  build_angles();
  compile();
}

std::unique_ptr<Program> Program::within(int64_t max_tokens, int64_t max_rows) {
  if (expert_cache_ != nullptr) throw std::invalid_argument("within: experts stay in a file");
  if (model_.state.layers > 0) throw std::invalid_argument("within: sequences have states");
  ProgramSizes sizes = sizes_;
  sizes.max_tokens = max_tokens;
  sizes.max_rows = max_rows;
  std::unique_ptr<Program> program(new Program(pool_, table_, model_, sizes, kv_));
  program->whole_ = this;
  return program;
}

// ---- compilation

void Program::build_products() {
  size_t activation_bytes = 0;
  for (size_t i = 0; i < model_.ops.size(); ++i) {
    std::unique_ptr<Product> product;
    if (const auto* linear = std::get_if<op::Linear>(&model_.ops[i]))
      product = std::make_unique<Product>(table_, model_, values_, rows_.of_op[i], *linear);
    if (const auto* logits = std::get_if<op::Logits>(&model_.ops[i]))
      product = std::make_unique<Product>(table_, model_, values_, rows_.of_op[i], *logits);
    if (product != nullptr)
      activation_bytes = std::max(activation_bytes, product->activation_bytes(max_rows(rows_.of_op[i])));
    products_.push_back(std::move(product));
    std::unique_ptr<HeadProduct> heads;
    if (const auto* op = std::get_if<op::HeadLinear>(&model_.ops[i])) {
      heads = std::make_unique<HeadProduct>(table_, model_, values_, rows_.of_op[i], *op);
      activation_bytes = std::max(activation_bytes, heads->activation_bytes() * max_rows(rows_.of_op[i]));
    }
    head_products_.push_back(std::move(heads));
    std::unique_ptr<Experts> experts;
    if (const auto* op = std::get_if<op::Experts>(&model_.ops[i])) {
      const Rows rows = rows_.of_op[i];
      experts = std::make_unique<Experts>(table_, model_, values_, rows, *op);
      experts->reserve(experts_memory_, max_rows(rows), pool_->threads());
      activation_bytes = std::max(activation_bytes, experts->activation_bytes() * max_rows(rows));
    }
    experts_.push_back(std::move(experts));
  }
  activation_memory_ = Mapping(activation_bytes);
  std::memset(activation_memory_.data(), 0, activation_bytes);
}

void Program::build_expert_cache() {
  int64_t units = 0, most = 0;
  size_t slot = 0;
  for (const auto& experts : experts_) {
    if (experts == nullptr || !experts->mapped()) continue;
    units += experts->experts();
    most = std::max(most, experts->experts());
    slot = std::max(slot, experts->unit_bytes());
  }
  if (units == 0) return;
  if (sizes_.expert_bytes / static_cast<int64_t>(slot) < most)
    throw std::invalid_argument("expert_bytes: " + std::to_string(sizes_.expert_bytes) + " do not hold the " +
                                std::to_string(most) + " experts of one layer, which take " + std::to_string(most * slot));
  expert_cache_ = std::make_unique<ExpertCache>(sizes_.expert_bytes, slot, units);
  units = 0;
  for (const auto& experts : experts_) {
    if (experts == nullptr || !experts->mapped()) continue;
    experts->use(*expert_cache_, units);
    units += experts->experts();
  }
  for (size_t i = 0; i < experts_.size(); ++i)
    if (experts_[i] != nullptr && experts_[i]->mapped()) build_read_ahead(i);
}

// Which experts follow those of op i, and which weights give their router's logits.
void Program::build_read_ahead(size_t i) {
  const int64_t width = values_.widths[std::get<op::Experts>(model_.ops[i]).x];
  const op::LinearPart* part = nullptr;
  const op::Route* route = nullptr;
  std::vector<const op::Linear*> linears;
  for (size_t j = i + 1; j < model_.ops.size(); ++j) {
    if (const auto* linear = std::get_if<op::Linear>(&model_.ops[j])) linears.push_back(linear);
    if (const auto* r = std::get_if<op::Route>(&model_.ops[j])) {
      route = r;
      for (const op::Linear* linear : linears)
        for (const op::LinearPart& p : linear->parts)
          if (p.out == route->logits) part = &p;
    }
    if (std::holds_alternative<op::Experts>(model_.ops[j])) {
      if (part == nullptr || !experts_[j]->mapped() || model_.weights[part->weight]->cols() != width) return;
      experts_[i]->read_ahead(*model_.weights[part->weight], *experts_[j]);
      return;
    }
  }
}

// The angles of a step serve all layers.
void Program::build_angles() {
  for (size_t i = 0; i < model_.ops.size(); ++i) {
    const auto* rope = std::get_if<op::Rope>(&model_.ops[i]);
    if (rope == nullptr) continue;
    const bool known = std::any_of(angles_.begin(), angles_.end(), [&](const RopeAngles& a) {
      return a.inv_freq == rope->inv_freq && a.scale == rope->scale;
    });
    if (known) continue;
    const int64_t pairs = model_.weights[rope->inv_freq]->cols();
    angles_.push_back({rope->inv_freq, rope->scale, i, std::vector<float>(sizes_.max_tokens * 2 * pairs)});
  }
}

void Program::compile() {
  for (RopeAngles& a : angles_) {
    std::vector<float> inv_freq = vector_of(*model_.weights[a.inv_freq]);
    const int64_t width = static_cast<int64_t>(inv_freq.size()) * 8;  // a sine and a cosine cost more than a float
    add_row_op(a.first_op, Rows::kTokens, width, make_rope_angles(std::move(inv_freq), a.scale, a.cos_sin.data()));
  }
  for (size_t i = 0; i < model_.ops.size(); ++i) std::visit([this, i](const auto& op) { add(i, op); }, model_.ops[i]);
  look_ahead();
}

// Each stage learns which product comes after it.
void Program::look_ahead() {
  const ReadAhead* next = nullptr;
  for (auto stage = stages_.rbegin(); stage != stages_.rend(); ++stage) {
    stage->next = next;
    const auto* whole = std::get_if<WholeOp>(&stage->what);
    if (whole != nullptr && products_[whole->op] != nullptr)
      next = pool_->keep(products_[whole->op]->read_ahead(pool_->threads()));
  }
}

void Program::add_row_op(size_t op, Rows rows, int64_t width, RowFunction run) {
  RowPass* pass = stages_.empty() ? nullptr : std::get_if<RowPass>(&stages_.back().what);
  if (pass == nullptr || pass->rows != rows) {
    stages_.push_back({RowPass{rows, 0, {}}});
    pass = &std::get<RowPass>(stages_.back().what);
  }
  pass->width += width;
  pass->ops.push_back({op, std::move(run)});
}

void Program::add_whole(size_t op, WholeFunction run) { stages_.push_back({WholeOp{op, std::move(run)}}); }

void Program::add_product(size_t op, int64_t width) {
  const Product& product = *products_[op];
  const Rows rows = rows_.of_op[op];
  add_row_op(op, rows, width, product.make_quantize(activation_memory_.data(), max_rows(rows)));
  add_whole(op, product.make_multiply(*pool_, activation_memory_.data(), max_rows(rows)));
}

void Program::add(size_t i, const op::Embed& op) {
  add_row_op(i, rows_.of_op[i], values_.widths[op.out], make_embed(model_, values_, op));
}
void Program::add(size_t i, const op::RmsNorm& op) {
  add_row_op(i, rows_.of_op[i], values_.widths[op.x], make_rms_norm(table_, model_, values_, op));
}
void Program::add(size_t i, const op::Linear& op) { add_product(i, values_.widths[op.x]); }
void Program::add(size_t i, const op::Rope& op) {
  const auto angles = std::find_if(angles_.begin(), angles_.end(), [&](const RopeAngles& a) {
    return a.inv_freq == op.inv_freq && a.scale == op.scale;
  });
  const int64_t pairs = model_.weights[op.inv_freq]->cols();
  add_row_op(i, rows_.of_op[i], values_.widths[op.x], make_rope(table_, values_, op, pairs, angles->cos_sin.data()));
}
void Program::add(size_t i, const op::PositionScale& op) {
  add_row_op(i, rows_.of_op[i], values_.widths[op.x], make_position_scale(values_, op));
}
void Program::add(size_t i, const op::HeadLinear& op) {
  const HeadProduct& product = *head_products_[i];
  const Rows rows = rows_.of_op[i];
  add_row_op(i, rows, values_.widths[op.x], product.make_quantize(activation_memory_.data(), max_rows(rows)));
  add_whole(i, product.make_multiply(*pool_, activation_memory_.data(), max_rows(rows)));
}
void Program::add(size_t i, const op::MlaAttention& op) {
  add_row_op(i, rows_.of_op[i], values_.widths[op.latent], make_store_latent(table_, values_, *kv_, op));
  add_whole(i, make_attention(table_, *pool_, values_, *kv_, op, attention_memory_));
}
void Program::add(size_t i, const op::Attention& op) {
  add_row_op(i, rows_.of_op[i], 4 * values_.widths[op.k], make_store_kv(table_, values_, *kv_, op));
  add_whole(i, make_attention(table_, *pool_, model_, values_, *kv_, op, attention_memory_));
}
void Program::add(size_t i, const op::ShortConv& op) {
  add_whole(i, make_short_conv(table_, *pool_, model_, values_, states_, op));
}
void Program::add(size_t i, const op::DeltaRule& op) {
  constexpr int64_t kFloatsOfGate = 64;  // three exponentials and a logarithm
  const int64_t width = 4 * op.k_heads * op.k_dim + kFloatsOfGate * op.v_heads;
  add_row_op(i, rows_.of_op[i], width, make_delta_inputs(table_, model_, values_, op));
  add_whole(i, make_delta_rule(table_, *pool_, values_, states_, op));
}
void Program::add(size_t i, const op::Gated& op) {
  add_row_op(i, rows_.of_op[i], 3 * values_.widths[op.out], make_gated(table_, values_, op));
}
void Program::add(size_t i, const op::Route& op) {
  constexpr int64_t kFloatsOfExpert = 16;  // an exponential and a comparison cost more than a float
  add_row_op(i, rows_.of_op[i], kFloatsOfExpert * op.experts, make_route(table_, model_, values_, op));
}
void Program::add(size_t i, const op::Experts& op) {
  const Experts& experts = *experts_[i];
  const Rows rows = rows_.of_op[i];
  add_row_op(i, rows, values_.widths[op.x], experts.make_present(activation_memory_.data(), max_rows(rows)));
  add_whole(i, experts.make_compute(*pool_, activation_memory_.data(), max_rows(rows), experts_memory_));
}
void Program::add(size_t i, const op::Add& op) {
  add_row_op(i, rows_.of_op[i], values_.widths[op.out], make_add(table_, values_, op));
}
void Program::add(size_t i, const op::GatherRows& op) {
  add_row_op(i, rows_.of_op[i], values_.widths[op.out], make_gather(values_, op));
}
void Program::add(size_t i, const op::Logits& op) { add_product(i, values_.widths[op.x]); }

// ---- a step

void Program::step(const Batch& batch, const Sampling& sampling, const Drawn& drawn,
                   const std::function<void()>& between) {
  const ThreadPool::Session session(*pool_);
  check(batch);
  check_sampling(sampling, drawn, static_cast<int64_t>(batch.logit_rows.size()), rows_.vocab);
  prepare(batch);
  compute(between);
  const op::Logits& last = std::get<op::Logits>(model_.ops.back());
  timed(model_.ops.size(), [&] { sampler_.draw(*pool_, values_.data[last.out], values_.strides[last.out], sampling, drawn); });
}

void Program::logits(const Batch& batch, std::span<float> logits) {
  const ThreadPool::Session session(*pool_);
  check(batch);
  if (logits.size() != batch.logit_rows.size() * rows_.vocab) throw std::invalid_argument("logits: wrong size");
  prepare(batch);
  compute();
  const op::Logits& last = std::get<op::Logits>(model_.ops.back());
  for (size_t r = 0; r < batch.logit_rows.size(); ++r)
    std::copy_n(values_.data[last.out] + r * values_.strides[last.out], rows_.vocab, logits.data() + r * rows_.vocab);
}

void Program::copy_state(int64_t source, int64_t target) {
  const ThreadPool::Session session(*pool_);
  states_.copy(source, target);
}

void Program::check(const Batch& batch) {
  check_batch(batch, {sizes_.max_tokens, sizes_.max_rows, sizes_.blocks, rows_.vocab, states_.slots()});
  ++check_number_;
  for (int64_t s = 0; s < batch.sequences(); ++s) {
    const int64_t begin = batch.context[s], end = begin + batch.starts[s + 1] - batch.starts[s];
    if (begin == end) continue;
    for (int64_t i = begin / kBlockTokens; i <= (end - 1) / kBlockTokens; ++i) {
      const int32_t block = batch.blocks[batch.block_starts[s] + i];
      if (block_writer_[block] == check_number_ || (whole_ != nullptr && whole_->writes(block)))
        throw std::invalid_argument("blocks: block " + std::to_string(block) + " is written twice");
      block_writer_[block] = check_number_;
    }
  }
}

void Program::prepare(const Batch& batch) {
  step_.batch = batch;
  step_.positions.clear();
  step_.token_block.clear();
  step_.query_rows.clear();
  for (int64_t s = 0; s < batch.sequences(); ++s) {
    const int64_t n = batch.starts[s + 1] - batch.starts[s];
    const int32_t* table = batch.blocks.data() + batch.block_starts[s];
    for (int64_t t = 0; t < n; ++t) {
      const int64_t position = batch.context[s] + t;
      step_.positions.push_back(position);
      step_.token_block.push_back(table[position / kBlockTokens]);
    }
    for (int64_t t = 0; t < n; t += kQueryRows)
      step_.query_rows.push_back({s, batch.starts[s] + t, std::min(kQueryRows, n - t), batch.context[s] + t});
  }
  const auto keys_read = [](const QueryRows& q) { return q.rows * (q.first_position + q.rows); };
  std::sort(step_.query_rows.begin(), step_.query_rows.end(),
            [&](const QueryRows& a, const QueryRows& b) { return keys_read(a) > keys_read(b); });
}

void Program::compute(const std::function<void()>& between) {
  struct InStep {
    explicit InStep(bool& flag) : flag(flag) { flag = true; }
    ~InStep() { flag = false; }
    bool& flag;
  } const in_step(in_step_);
  auto looked = std::chrono::steady_clock::now();
  for (const Stage& stage : stages_) {
    if (between && std::chrono::steady_clock::now() - looked >= kBetween) {
      between();
      looked = std::chrono::steady_clock::now();
    }
    pool_->will_read(stage.next);
    if (const auto* pass = std::get_if<RowPass>(&stage.what)) {
      run_rows(*pass);
    } else {
      const WholeOp& whole = std::get<WholeOp>(stage.what);
      timed(whole.op, [&] { whole.run(step_); });
    }
  }
}

void Program::run_rows(const RowPass& pass) {
  const int64_t rows = step_.rows(pass.rows);
  if (rows == 0) return;
  const int64_t balanced = (rows + pool_->threads() * 4 - 1) / (pool_->threads() * 4);
  const int64_t chunk = rows * pass.width <= kInlineFloats ? rows : std::min(balanced, kRowsOfChunk);
  const auto run = [&](const RowOp* begin, const RowOp* end) {
    pool_->parallel_for((rows + chunk - 1) / chunk, [&](int64_t i, int) {
      for (const RowOp* op = begin; op != end; ++op) op->run(step_, i * chunk, std::min((i + 1) * chunk, rows));
    });
  };
  const RowOp *begin = pass.ops.data(), *end = begin + pass.ops.size();
  if (!profiling_) return run(begin, end);
  for (const RowOp* op = begin; op != end; ++op) timed(op->op, [&] { run(op, op + 1); });
}

template <class F>
void Program::timed(size_t op, F&& run) {
  if (!profiling_) return run();
  const auto start = std::chrono::steady_clock::now();
  run();
  profile_[op].first += 1;
  profile_[op].second += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Program::set_profiling(bool on) {
  const ThreadPool::Session session(*pool_);
  if (on && !profiling_) profile_.assign(profile_.size(), {0, 0.0});
  profiling_ = on;
}

std::vector<std::pair<int64_t, double>> Program::profile() {
  const ThreadPool::Session session(*pool_);
  return profile_;
}

}  // namespace kt
