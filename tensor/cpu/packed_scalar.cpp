// The packed kernels' inner loops in plain C++: the definition that every vector version is tested
// against, and what runs on processors without one. Activations stay float, sums are double. Table
// and contract: packed_isa.h.
#include <algorithm>
#include <cstring>

#include "tensor/cpu/packed_isa.h"
#include "tensor/numeric.h"

namespace omq::cpu {

namespace {

constexpr int kRows = 16;  // of a panel

bool always() { return true; }

struct Grid {
  float scale[kRows], zero[kRows];
};

// Scales and zero points that follow the codes of a block.
Grid grid_at(const PanelView& w, const uint8_t* at) {
  uint16_t bits[2 * kRows];
  std::memcpy(bits, at, w.symmetric ? sizeof bits / 2 : sizeof bits);
  Grid g;
  for (int r = 0; r < kRows; ++r) {
    g.scale[r] = f16_bits_to_f32(bits[r]);
    g.zero[r] =
        w.symmetric ? static_cast<float>(1 << (w.bits - 1)) : f16_bits_to_f32(bits[kRows + r]);
  }
  return g;
}

// Calls f(column, weights[16]) for every column of one panel, in order.
template <class F> void for_each_column(const PanelView& w, int64_t panel, F&& f) {
  const int64_t step = w.bits == 8 ? 4 : w.bits == 4 ? 8 : 16;
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* block = w.data + panel * w.panel_bytes + g * w.block_bytes;
    const int64_t cols = g + 1 < w.groups ? w.group_cols : w.last_cols;
    const int64_t padded = (cols + step - 1) / step * step;
    const Grid grid = grid_at(w, block + padded * kRows * w.bits / 8);
    for (int64_t c = 0; c < cols; c += 4) {
      uint8_t codes[4 * kRows];
      unpack_quad(block, w.bits, padded, c / 4, codes);
      for (int64_t j = 0; j < std::min<int64_t>(4, cols - c); ++j) {
        float weights[kRows];
        for (int r = 0; r < kRows; ++r)
          weights[r] = grid.scale[r] * (static_cast<float>(codes[4 * r + j]) - grid.zero[r]);
        f(g * w.group_cols + c + j, weights);
      }
    }
  }
}

int64_t prepared_bytes(const PanelView& w) { return (w.cols * 4 + 63) / 64 * 64; }

void prepare(const PanelView& w, const float* x, std::byte* out) {
  std::memcpy(out, x, static_cast<size_t>(w.cols) * 4);
}

void gemv(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1) {
  for (int64_t panel = panel0; panel < panel1; ++panel)
    for (int64_t i = 0; i < m; ++i) {
      const float* row = reinterpret_cast<const float*>(x + i * prepared_bytes(w));
      double sum[kRows] = {};
      for_each_column(w, panel, [&](int64_t c, const float* weights) {
        const double xc = row[c];
        for (int r = 0; r < kRows; ++r) sum[r] += xc * static_cast<double>(weights[r]);
      });
      const int64_t first = panel * kRows, live = std::min<int64_t>(kRows, w.rows - first);
      for (int64_t r = 0; r < live; ++r) y[i * w.rows + first + r] = static_cast<float>(sum[r]);
    }
}

void dequantize(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  for_each_column(w, panel, [&](int64_t c, const float* weights) {
    std::memcpy(out + c * ld, weights, kRows * sizeof(float));
  });
}

float value_at(const void* values, Stored type, int64_t i) {
  if (type == Stored::F32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return type == Stored::BF16 ? bf16_bits_to_f32(bits) : f16_bits_to_f32(bits);
}

void dense_gemv(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                int64_t row1) {
  for (int64_t n = row0; n < row1; ++n)
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < w.cols; ++k)
        sum += static_cast<double>(x[i * w.cols + k]) *
               static_cast<double>(value_at(w.data, w.type, n * w.cols + k));
      y[i * w.rows + n] = static_cast<float>(sum);
    }
}

void widen(const void* values, Stored type, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = value_at(values, type, i);
}

}  // namespace

const PackedIsa kScalarIsa = {
    .name = "scalar",
    .runs_here = always,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .gemv = gemv,
    .gemv_for_many_rows = false,
    .dequantize = dequantize,
    .dense_gemv = dense_gemv,
    .widen = widen,
};

}  // namespace omq::cpu
