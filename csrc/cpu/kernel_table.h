// What one instruction set offers: a struct of plain functions. One constant of it per ISA, chosen once at run time.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kt {

// Weight formats, with GGUF's type numbers, so that a tensor's type is its format; from 1000 on our own, for checkpoints
// of Hugging Face (formats/block_hf.h).
enum class Format : int32_t {
  kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8,
  kQ2_K = 10, kQ3_K = 11, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kBF16 = 30,
  kIQ2_XXS = 16, kIQ2_XS = 17, kIQ3_XXS = 18, kIQ1_S = 19, kIQ3_S = 21, kIQ2_S = 22, kIQ1_M = 29,
  kMXFP4 = 39, kF8_E4M3 = 1000, kI4_32 = 1001, kI4_128 = 1002, kI4Z_32 = 1003, kI4Z_128 = 1004,
};

// How a product's input rows are presented to gemm; it depends on the weight's format and on the table.
//   kInt8: groups of 32, each with one float scale and the sums of its int8 (kernels/quantize.inl)
//   kInt8FarOut: the same, and 15 bits for four neighbours that stand far out of their group. A caller may choose it
//     wherever a format asks for kInt8: a third of the error, for a few percent of the product's time
enum class Activation : int32_t { kF32, kBF16, kInt8, kInt8FarOut };

// Rows of a panel: the outputs that share one packed stream. Every table of today uses the same packed layout, so a
// packed weight may be read by any of them: its quads and pairs are rows of AMX's tiles, too.
inline constexpr int64_t kPanelRows = 16;

// Tokens of a KV block. Attention folds tiles of whole blocks that begin at absolute positions.
inline constexpr int64_t kBlockTokens = 16;

// Logits that share a partial maximum and sum in the sampler.
inline constexpr int64_t kSampleRun = 64;

// Attention folds tiles into a state for each span of this many positions, and merges the states in order: spans may be
// computed by different threads.
inline constexpr int64_t kSpanTokens = 512;

// How keys and values are kept. (kBF16 is bfloat16.)
//   kInt8: each token's key, and each token's value, of a head is about scale * q with a scale of its own
//   kLatent: rows that all heads read as keys and, in their first part, as values, in float16: [kBlockTokens][head_dim]
enum class KvFormat : int32_t { kBF16, kInt8, kLatent };

// The KV of one layer and one kv head in one block. kBF16, in the pairs that a dot product takes:
//   keys   [head_dim / 2][kBlockTokens][2]   (transposed: 16 scores are one vector)
//   values [kBlockTokens / 2][head_dim][2]   (two positions side by side)
// kInt8:
//   keys [head_dim][kBlockTokens], values [kBlockTokens][head_dim], float scales [kBlockTokens] of the keys, then of the
//   values
inline constexpr int64_t kv_head_bytes(KvFormat format, int64_t head_dim) {
  const int64_t elements = 2 * head_dim * kBlockTokens;
  if (format == KvFormat::kLatent) return elements;
  return format == KvFormat::kInt8 ? elements + 2 * kBlockTokens * static_cast<int64_t>(sizeof(float)) : 2 * elements;
}

struct AttentionTask {
  const float* q;          // row r, head g of the group at q + r * q_stride + g * (head_dim - tail)
  float* out;              // row r, head g at out + r * out_stride + g * value_dim
  int64_t q_stride, out_stride;
  int64_t rows;            // query rows (consecutive positions of one sequence)
  int64_t first_position;  // absolute position of row 0
  int64_t group;           // query heads that share this kv head
  int64_t head_dim;        // of queries and keys: a multiple of 16
  int64_t value_dim;       // of values and outputs: head_dim, of latent rows less
  KvFormat format;
  const uint8_t* kv;       // pool base of this layer and kv head: block b at kv + b * block_stride
  int64_t block_stride;    // in bytes
  const int32_t* blocks;   // block table of the sequence
  float scale, softcap;    // softcap 0: none
  int64_t window;          // 0: none; else position p sees (p - window, p]
  int64_t chunk;           // 0: none; else position p sees [p - p % chunk, p]
  const float* sinks;      // one more score of each head, without a value; null: none
  // The last `tail` elements of a query lie apart, at q_tail + r * tail_stride + g * tail_head.
  int64_t tail;
  const float* q_tail;
  int64_t tail_stride, tail_head;
};

// First position that `position` sees.
static inline int64_t first_seen(const AttentionTask& t, int64_t position) {
  const int64_t chunk = t.chunk > 0 ? position - position % t.chunk : 0;
  const int64_t window = t.window > 0 ? position - t.window + 1 : 0;
  return window > chunk ? window : chunk;
}

// One head of the gated delta rule over consecutive tokens of one sequence, token t at + t * its stride.
struct DeltaTask {
  const float *q, *k;  // as the op defines them, divided by their lengths
  const float* v;
  const float *decay, *beta;  // factors of the old state and of the correction
  float* out;
  int64_t stride, gate_stride, out_stride;  // of q, k and v; of decay and beta; of out
  int64_t tokens, k_dim, v_dim;
  float* state;  // [k_dim][v_dim]
};

// Most taps of a short convolution.
inline constexpr int64_t kMaxTaps = 16;

struct KernelTable {
  const char* name;

  // ---- weights. Panels [begin, end) of kPanelRows outputs each; the last panel is padded with zeros.
  // `packed` is best aligned to 64 bytes; nothing needs it.
  size_t (*packed_bytes)(Format, int64_t rows, int64_t cols);  // 0: format or shape not supported
  void (*pack)(Format, const uint8_t* src, int64_t rows, int64_t cols, int64_t begin, int64_t end, uint8_t* packed);
  void (*unpack_row)(Format, const uint8_t* packed, int64_t rows, int64_t cols, int64_t row, float* out);
  // n elements, whole blocks, to the file's blocks of Q8_0 or Q4_0: the nearest integers for a float16 scale that makes the
  // largest of a block about 127, or exactly -8. Adds to sums[0] the squares of what is lost, to sums[1] those of x. False,
  // with only a part written, when a scale is not finite.
  bool (*requantize)(Format, const float* x, int64_t n, uint8_t* blocks, double* sums);

  // ---- products. y[r * ldy + o] = sum_k x[r][k] w[o][k] (+ bias[o]) for panels [begin, end). The order along k is
  // fixed and the same for any number of rows: work is split by output, never by k.
  Activation (*activation)(Format);
  size_t (*activation_bytes)(Activation, int64_t cols);  // of one row
  size_t (*activation_offset)(Activation, int64_t col);  // of column col, a multiple of 32, in a row
  // Part of a row may be presented by itself: the same, from the offset of its first column (not of kInt8FarOut).
  void (*quantize)(Activation, const float* x, int64_t ldx, int64_t rows, int64_t cols, uint8_t* act);
  void (*gemm)(Format, const uint8_t* packed, int64_t out_rows, int64_t cols, Activation, const uint8_t* act,
               int64_t rows, int64_t begin, int64_t end, const float* bias, float* y, int64_t ldy);
  // What gemm leaves out of rows that are kInt8FarOut, added to its y: the high parts of far-out quads, by an index of
  // them for all panels (kernels/far_out.inl).
  size_t (*far_out_bytes)(int64_t rows, int64_t cols);  // of the index
  void (*index_far_out)(const uint8_t* act, int64_t rows, int64_t cols, uint8_t* index);
  void (*add_far_out)(Format, const uint8_t* packed, int64_t out_rows, int64_t cols, const uint8_t* index, int64_t begin,
                      int64_t end, float* y, int64_t ldy);

  // ---- rows; an output may be one of the inputs. cos_sin: `pairs` cosines, then as many sines, the scale in both.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);
  void (*rope)(float* x, int64_t heads, int64_t head_dim, const float* cos_sin, int64_t pairs, bool interleaved);
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* y);
  void (*gelu_tanh_mul)(const float* gate, const float* up, int64_t n, float* y);
  void (*relu_mul)(const float* gate, const float* up, int64_t n, float* y);
  // g sigmoid(alpha g) (u + 1) with g = min(gate, limit), u = up within [-limit, limit]
  void (*swiglu_oai)(const float* gate, const float* up, int64_t n, float alpha, float limit, float* y);
  void (*add)(const float* a, const float* b, int64_t n, float* y);
  void (*softcap)(float* x, int64_t n, float cap);
  // y = weights[0] rows[0] + weights[1] rows[1] + ..., in this order, at least one
  void (*weighted_sum)(const float* const* rows, const float* weights, int64_t count, int64_t n, float* y);

  // ---- attention
  void (*store_kv)(KvFormat, const float* k, const float* v, int64_t head_dim, int64_t offset_in_block, uint8_t* block);
  void (*store_half)(const float* x, int64_t n, uint16_t* y);  // n a multiple of 16, to float16
  size_t (*attention_scratch_floats)(const AttentionTask&);
  void (*attention)(const AttentionTask&, float* scratch);
  // The same in parts: the state of one span that any of the rows sees, then all of them, one after another, merged.
  size_t (*attention_state_floats)(const AttentionTask&);
  void (*attention_span)(const AttentionTask&, int64_t span, float* state, float* scratch);
  void (*attention_merge)(const AttentionTask&, const float* states, float* scratch);

  // ---- recurrences
  // y[c] = silu(weights[0][c] rows[0][c] + weights[1][c] rows[1][c] + ...), in this order; row j of weights at + j * stride
  void (*short_conv)(const float* const* rows, const float* weights, int64_t stride, int64_t taps, int64_t n, float* y);
  // A token's result does not depend on where the tokens are divided into calls.
  void (*delta_rule)(const DeltaTask&);

  // ---- sampling: passes over a row of n logits, in runs of kSampleRun
  bool (*scan_logits)(const float* x, int64_t n, float* maxima);  // of each run; false: NaN or infinity among them
  // w[i] = exp((x[i] - maximum) / temperature); sums[run] of them
  void (*exp_logits)(const float* x, int64_t n, float maximum, float temperature, float* w, float* sums);

  // ---- limits, for benchmarks. What comes out must be used, or the compiler would drop the work.
  int64_t (*peak)(Activation, int64_t rounds, float* sink);  // operations done; 0: no dot product of that kind
  int32_t (*read)(const uint8_t* data, int64_t bytes);       // a sum of all of it; bytes a multiple of 256
};

extern const KernelTable kReference, kAvx2, kAvx512, kAvx512Bf16;

// What a table has of its own that is otherwise another one.
struct ProductKernels {
  decltype(KernelTable::gemm) gemm;
  decltype(KernelTable::peak) peak;
};

// Tiles of kAvx512Bf16 (kernels/tiled_gemm.inl), and kAvx2 with a dot product of bytes (kernels/byte_gemm.inl). The second
// of each computes what the instructions do with others, for tests where there are none.
extern const ProductKernels kAmxTiles, kEmulatedTiles;
extern const ProductKernels kAvxVnniProducts, kEmulatedVnniProducts;

}  // namespace kt
