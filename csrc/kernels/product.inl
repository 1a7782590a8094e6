// One product, and where its outputs go.
#pragma once

namespace kt {
namespace {

struct Product {
  const uint8_t* packed;
  int64_t out_rows, cols, panel_bytes;
  const uint8_t* act;
  int64_t stride;  // bytes between rows of act
  const float* bias;
  float* y;
  int64_t ldy;

  // Outputs of a panel: the last one may be padded.
  int outputs(int64_t panel) const {
    const int64_t left = out_rows - panel * kPanelRows;
    return static_cast<int>(left < kPanelRows ? left : kPanelRows);
  }
};

inline Floats load_outputs(const float* y, int outputs) { return outputs == kPanelRows ? load(y) : load_n(y, outputs); }

inline void store_outputs(float* y, int outputs, Floats value) {
  if (outputs == kPanelRows) {
    store(y, value);
  } else {
    store_n(y, value, outputs);
  }
}

// A complete sum, to y.
inline void finish_outputs(const Product& p, int64_t panel, int64_t row, Floats sum) {
  const int64_t first = panel * kPanelRows;
  const int outputs = p.outputs(panel);
  if (p.bias) sum = sum + load_n(p.bias + first, outputs);
  store_outputs(p.y + row * p.ldy + first, outputs, sum);
}

}  // namespace
}  // namespace kt
