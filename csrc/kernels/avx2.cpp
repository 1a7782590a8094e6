#include "cpu/kernel_table.h"
// In this order: each uses what is above it.
#include "kernels/dot_maddubs.h"
#include "kernels/vec_avx2.h"
#include "formats/formats.h"
#include "kernels/math.inl"
#include "kernels/elementwise.inl"
#include "kernels/pack.inl"
#include "kernels/quantize.inl"
#include "kernels/requantize.inl"
#include "kernels/gemm.inl"
#include "kernels/bf16.inl"
#include "kernels/kv_cells.inl"
#include "kernels/attention_tile.inl"
#include "kernels/attention_rows.inl"
#include "kernels/attention.inl"
#include "kernels/recurrence.inl"
#include "kernels/sampling.inl"
#include "kernels/limits.inl"
#include "kernels/table.inl"

namespace kt {
constinit const KernelTable kAvx2 = make_table("avx2");
}
