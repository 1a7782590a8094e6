#include "cpu/kernel_table.h"
// In this order: each uses what is above it.
#include "kernels/dot_emulated.h"
#include "kernels/vec_avx2.h"
#include "formats/formats.h"
#include "kernels/byte_gemm.inl"

namespace kt {
constinit const ProductKernels kEmulatedVnniProducts = {byte_gemm, peak};
}
