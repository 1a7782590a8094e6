// Weights: from the file's rows of blocks to panels, and one row back.
//
// A panel holds kPanelRows outputs. Integer formats: for each kGroups groups of 32 elements one header with the scales
// of all outputs, then the quads of each group (formats/quads.h). Float formats: a stream of pairs (formats/float.h), in
// blocks with the scales of all outputs before them where the format has scales (F8_E4M3).
// Either way a product reads a panel once, front to back, and every vector of it holds all 16 outputs.
#pragma once

namespace kt {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
int64_t file_row_bytes(int64_t cols) {
  if constexpr (kIsFloat<F>) {
    return cols * F::kFileBytes;
  } else {
    return cols / F::kElements * F::kFileBytes;
  }
}

template <class F>
int64_t panel_bytes(int64_t cols) {
  if constexpr (kIsFloat<F>) {
    return ceil_div(cols, 2) * F::kPairBytes;
  } else if constexpr (kIsScaledFloat<F>) {
    return cols / F::kElements * F::kBlockBytes;
  } else if constexpr (kIsCodebook<F>) {
    return cols / F::kElements * (F::kHeader + F::kGroups * F::kBytes);
  } else {
    const int64_t groups = cols / kGroup;
    return ceil_div(groups, F::kGroups) * F::kHeader + groups * F::Quads::kBytes;
  }
}

template <class F>
bool fits(int64_t rows, int64_t cols) {
  if (rows < 1 || cols < 1) return false;
  if constexpr (kIsFloat<F>) {
    return true;
  } else {
    return cols % F::kElements == 0;
  }
}

size_t packed_bytes(Format format, int64_t rows, int64_t cols) {
  size_t bytes = 0;
  with_format(format, [&](auto f) {
    using F = decltype(f);
    if (fits<F>(rows, cols)) bytes = static_cast<size_t>(ceil_div(rows, kPanelRows) * panel_bytes<F>(cols));
  });
  return bytes;
}

// Lanes [0, outputs) of a zeroed panel from as many rows at src.
template <class F>
void pack_float_panel(const uint8_t* src, int outputs, int64_t cols, uint8_t* panel) {
  for (int lane = 0; lane < outputs; ++lane) {
    const uint8_t* row = src + lane * file_row_bytes<F>(cols);
    for (int64_t k = 0; k < cols; ++k) {
      __builtin_memcpy(panel + F::offset(k, lane), row + k * F::kFileBytes, F::kFileBytes);
    }
  }
}

template <class F>
void pack_scaled_panel(const uint8_t* src, int outputs, int64_t cols, uint8_t* panel) {
  const int64_t blocks = cols / F::kElements;
  for (int64_t b = 0; b < blocks; ++b, panel += F::kBlockBytes) {
    for (int lane = 0; lane < outputs; ++lane) {
      const uint8_t* block = src + (lane * blocks + b) * F::kFileBytes;
      __builtin_memcpy(panel + 4 * lane, block, 4);
      for (int k = 0; k < F::kElements; ++k) panel[F::kHeader + k * kPanelRows + lane] = block[4 + k];
    }
  }
}

template <class F>
void pack_codebook_panel(const uint8_t* src, int outputs, int64_t cols, uint8_t* panel) {
  const int64_t blocks = cols / F::kElements;
  for (int64_t b = 0; b < blocks; ++b, panel += F::kHeader + F::kGroups * F::kBytes) {
    for (int lane = 0; lane < outputs; ++lane) {
      const uint8_t* block = src + (lane * blocks + b) * F::kFileBytes;
      F::write_header(block, lane, panel);
      for (int g = 0; g < F::kGroups; ++g) F::write_group(block, g, lane, panel + F::kHeader + g * F::kBytes);
    }
  }
}

template <class F>
void pack_integer_panel(const uint8_t* src, int outputs, int64_t cols, uint8_t* panel) {
  constexpr int kPerBlock = F::kElements / kGroup;
  const int64_t groups = cols / kGroup;
  QuadArray quads{};
  for (int64_t g = 0; g < groups; ++g) {
    const int place = static_cast<int>(g % F::kGroups), in_block = static_cast<int>(g % kPerBlock);
    uint8_t* const header = panel;
    uint8_t* const packed = header + F::kHeader + place * F::Quads::kBytes;
    for (int lane = 0; lane < outputs; ++lane) {
      const uint8_t* block = src + lane * file_row_bytes<F>(cols) + g / kPerBlock * F::kFileBytes;
      uint8_t q[kGroup];
      F::read(block, in_block, q);
      for (int i = 0; i < kGroup / 4; ++i) __builtin_memcpy(&quads[i][4 * lane], q + 4 * i, 4);
      F::write_header(block, in_block, place, lane, header);
    }
    F::Quads::pack(quads, packed);
    if (place == F::kGroups - 1) panel = packed + F::Quads::kBytes;
  }
}

void pack(Format format, const uint8_t* src, int64_t rows, int64_t cols, int64_t begin, int64_t end, uint8_t* packed) {
  with_format(format, [&](auto f) {
    using F = decltype(f);
    const int64_t bytes = panel_bytes<F>(cols);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kPanelRows;
      const int outputs = static_cast<int>(rows - first < kPanelRows ? rows - first : kPanelRows);
      const uint8_t* from = src + first * file_row_bytes<F>(cols);
      uint8_t* panel = packed + p * bytes;
      __builtin_memset(panel, 0, static_cast<size_t>(bytes));
      if constexpr (kIsFloat<F>) {
        pack_float_panel<F>(from, outputs, cols, panel);
      } else if constexpr (kIsScaledFloat<F>) {
        pack_scaled_panel<F>(from, outputs, cols, panel);
      } else if constexpr (kIsCodebook<F>) {
        pack_codebook_panel<F>(from, outputs, cols, panel);
      } else {
        pack_integer_panel<F>(from, outputs, cols, panel);
      }
    }
  });
}

template <class F>
void unpack_float_row(const uint8_t* panel, int64_t cols, int lane, float* out) {
  for (int64_t k = 0; k < cols; k += 2, panel += F::kPairBytes) {
    Floats pair[2];
    F::pair(panel, pair[0], pair[1]);
    for (int j = 0; j < 2 && k + j < cols; ++j) {
      float lanes[kLanes];
      store(lanes, pair[j]);
      out[k + j] = lanes[lane];
    }
  }
}

template <class F>
void unpack_scaled_row(const uint8_t* panel, int64_t cols, int lane, float* out) {
  for (int64_t b = 0; b < cols / F::kElements; ++b, panel += F::kBlockBytes) {
    const Floats scale = load(reinterpret_cast<const float*>(panel));
    for (int k = 0; k < F::kElements; ++k) {
      float lanes[kLanes];
      store(lanes, F::decode(panel + F::kHeader + k * kPanelRows) * scale);
      *out++ = lanes[lane];
    }
  }
}

template <class F>
void unpack_codebook_row(const uint8_t* panel, int64_t cols, int lane, float* out) {
  for (int64_t g = 0; g < cols / kGroup; ++g) {
    const int place = static_cast<int>(g % F::kGroups);
    const uint8_t* packed = panel + F::kHeader + place * F::kBytes;
    const Scales scales = F::scales(panel, place, packed);
    for (int q = 0; q < kGroup / 4; ++q) {
      uint8_t quad[kQuadBytes];
      float d[kLanes];
      store_bytes(quad, F::quad(panel, place, packed, q));
      store(d, scales.d[8 * q / kGroup]);
      for (int i = 0; i < 4; ++i) *out++ = d[lane] * static_cast<float>(quad[4 * lane + i] - kCodebookBias);
    }
    if (place == F::kGroups - 1) panel += F::kHeader + F::kGroups * F::kBytes;
  }
}

// One group of one output: d * q + m, rounded twice, as every reader of these files does.
template <class F>
void unpack_group(const uint8_t* header, int place, const uint8_t* packed, int lane, float* out) {
  const Scales scales = F::scales(header, place);
  float d[2][kLanes], m[2][kLanes];
  for (int s = 0; s < F::kSubgroups; ++s) {
    store(d[s], scales.d[s]);
    if constexpr (F::kHasMin) store(m[s], scales.m[s]);
  }
  unroll<kGroup / 4>([&](auto quad) {
    uint8_t bytes[kQuadBytes];
    store_bytes(bytes, F::template quad<quad>(packed));
    const int s = quad * F::kSubgroups / (kGroup / 4);
    for (int j = 0; j < 4; ++j) {
      const float q = static_cast<float>(static_cast<int>(bytes[4 * lane + j]) - F::kBias);
      float value = d[s][lane] * q;
      if constexpr (F::kHasMin) value += m[s][lane];
      out[4 * quad + j] = value;
    }
  });
}

void unpack_row(Format format, const uint8_t* packed, int64_t, int64_t cols, int64_t row, float* out) {
  with_format(format, [&](auto f) {
    using F = decltype(f);
    const uint8_t* panel = packed + row / kPanelRows * panel_bytes<F>(cols);
    const int lane = static_cast<int>(row % kPanelRows);
    if constexpr (kIsFloat<F>) {
      unpack_float_row<F>(panel, cols, lane, out);
    } else if constexpr (kIsScaledFloat<F>) {
      unpack_scaled_row<F>(panel, cols, lane, out);
    } else if constexpr (kIsCodebook<F>) {
      unpack_codebook_row<F>(panel, cols, lane, out);
    } else {
      const uint8_t* header = panel;
      for (int64_t g = 0; g < cols / kGroup; ++g) {
        const int place = static_cast<int>(g % F::kGroups);
        const uint8_t* quads = header + F::kHeader + place * F::Quads::kBytes;
        unpack_group<F>(header, place, quads, lane, out + g * kGroup);
        if (place == F::kGroups - 1) header = quads + F::Quads::kBytes;
      }
    }
  });
}

}  // namespace
}  // namespace kt
