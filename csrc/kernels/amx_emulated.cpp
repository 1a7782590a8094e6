#include "cpu/kernel_table.h"
#include "kernels/vec_avx512.h"
// In this order: each uses what is above it.
#include "formats/formats.h"
#include "kernels/activations.inl"
#include "kernels/tiles_emulated.h"
#include "kernels/tiled_gemm.inl"

namespace kt {
constinit const ProductKernels kEmulatedTiles = {tiled_gemm, tiled_peak};
}
