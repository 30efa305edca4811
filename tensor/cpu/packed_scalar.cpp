// The packed kernels' inner loops in plain C++: the definition that every vector version is tested
// against, and what runs on processors without one. Activations that come as floats stay floats,
// sums are double; codes with codes are multiplied in integers. Table and contract: packed_isa.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor/cpu/packed_isa.h"
#include "tensor/numeric.h"
#include "tensor/packed.h"

namespace omq::cpu {

namespace {

constexpr int kRows = 16;  // of a panel

bool always() { return true; }

struct Grid {
  float scale[kRows], zero[kRows];
};

// Scales and zero points that follow the codes of a block.
Grid grid_at(const PanelView& w, const uint8_t* at) {
  uint16_t scales[kRows];
  std::memcpy(scales, at, sizeof scales);
  Grid g;
  for (int r = 0; r < kRows; ++r) {
    g.scale[r] = f16_bits_to_f32(scales[r]);
    g.zero[r] = static_cast<float>(w.symmetric ? 1 << (w.bits - 1) : at[sizeof scales + r]);
  }
  return g;
}

// The block of group g of one panel.
struct Block {
  const uint8_t* bytes;
  int64_t cols, padded;
  Grid grid;

  Block(const PanelView& w, int64_t panel, int64_t g)
      : bytes(w.data + panel * w.panel_bytes + g * w.block_bytes),
        cols(g + 1 < w.groups ? w.group_cols : w.last_cols) {
    padded = PackedInt::padded_columns(cols, w.bits);
    grid = grid_at(w, bytes + padded * kRows * w.bits / 8);
  }
  // Calls f(column of the block, code of row 0, stride to the next row's) for columns [begin, end);
  // begin is a multiple of 4.
  template <class F> void for_each_column(int bits, int64_t begin, int64_t end, F&& f) const {
    for (int64_t c = begin; c < end; c += 4) {
      uint8_t codes[4 * kRows];
      unpack_quad(bytes, bits, c / 4, codes);
      for (int64_t j = 0; j < std::min<int64_t>(4, end - c); ++j) f(c + j, codes + j);
    }
  }
};

// Calls f(column, weights[16]) for every column of one panel, in order.
template <class F> void for_each_column(const PanelView& w, int64_t panel, F&& f) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const Block b(w, panel, g);
    b.for_each_column(w.bits, 0, b.cols, [&](int64_t c, const uint8_t* codes) {
      float weights[kRows];
      for (int r = 0; r < kRows; ++r)
        weights[r] = b.grid.scale[r] * (static_cast<float>(codes[4 * r]) - b.grid.zero[r]);
      f(g * w.group_cols + c, weights);
    });
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

// ---- codes with codes ----

int64_t round_up_64(int64_t n) { return (n + 63) / 64 * 64; }

// y of one panel for one row of x: the definition of the product (packed_isa.h).
void codes_row(const PanelView& w, const std::byte* prepared, int64_t panel, float* total) {
  float scale;
  int32_t rest;
  std::memcpy(&scale, prepared, 4);
  std::memcpy(&rest, prepared + 4, 4);
  const auto* x = reinterpret_cast<const int8_t*>(prepared + 64 + round_up_64(4 * w.chunks));
  std::fill_n(total, kRows, 0.0f);
  for (int64_t g = 0; g < w.groups; ++g) {
    const Block b(w, panel, g);
    for (int64_t c0 = 0; c0 < b.cols; c0 += w.chunk_cols, x += w.chunk_stride) {
      int32_t dot[kRows] = {};
      b.for_each_column(
          w.bits, c0, std::min(b.cols, c0 + w.chunk_cols), [&](int64_t c, const uint8_t* codes) {
            for (int r = 0; r < kRows; ++r)
              dot[r] += (codes[4 * r] - static_cast<int32_t>(b.grid.zero[r])) * (x[c - c0] - rest);
          });
      for (int r = 0; r < kRows; ++r)
        total[r] = std::fma(static_cast<float>(dot[r]), b.grid.scale[r] * scale, total[r]);
    }
  }
}

void gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte*) {
  for (int64_t panel = panel0; panel < panel1; ++panel)
    for (int64_t i = 0; i < m; ++i) {
      float total[kRows];
      codes_row(w, x + i * prepared_codes_bytes(w), panel, total);
      const int64_t first = panel * kRows, live = std::min<int64_t>(kRows, w.rows - first);
      std::copy_n(total, live, y + i * w.rows + first);
    }
}

int64_t gemm_codes_scratch_bytes(const PanelView&) { return 0; }

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

int64_t prepared_codes_bytes(const PanelView& w) {
  return 64 + round_up_64(4 * w.chunks) + round_up_64(w.chunks * w.chunk_stride);
}

void prepare_codes(const PanelView& w, const RowCodes& x, std::byte* out) {
  const int32_t offset = x.bits < 8 ? x.zero : 128, rest = x.zero - offset;
  std::memcpy(out, &x.scale, 4);
  std::memcpy(out + 4, &rest, 4);
  auto* sums = reinterpret_cast<int32_t*>(out + 64);
  auto* bytes = reinterpret_cast<int8_t*>(out + 64 + round_up_64(4 * w.chunks));
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t cols = g + 1 < w.groups ? w.group_cols : w.last_cols;
    const uint8_t* codes = x.codes + g * w.group_cols;
    for (int64_t c0 = 0; c0 < cols; c0 += w.chunk_cols, bytes += w.chunk_stride) {
      const int64_t n = std::min(w.chunk_cols, cols - c0);
      int32_t sum = 0;
      for (int64_t c = 0; c < n; ++c) {
        const int32_t byte = codes[c0 + c] - offset;
        bytes[c] = static_cast<int8_t>(byte);
        sum += byte;
      }
      std::fill(bytes + n, bytes + w.chunk_stride, int8_t{0});
      *sums++ = sum;
    }
  }
}

const PackedIsa kScalarIsa = {
    .name = "scalar",
    .runs_here = always,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .gemv = gemv,
    .gemv_for_many_rows = false,
    .prepare_codes_for_gemv = nullptr,
    .gemm_codes = gemm_codes,
    .gemm_codes_scratch_bytes = gemm_codes_scratch_bytes,
    .dequantize = dequantize,
    .dense_gemv = dense_gemv,
    .widen = widen,
};

}  // namespace omq::cpu
