// gemm_tile without oneDNN: packed panels and one register tile that the compiler vectorises.
//
//   C [m, n] in blocks of 6 × 16: A is packed as [k][6], B as [k][16], so that the inner loop is 12
//   vector FMAs on two loads and six broadcasts (256-bit registers). K is cut at 256, so that a
//   packed panel stays in the caches.
#include <algorithm>
#include <vector>

#include "tensor/cpu/gemm.h"

namespace omq::cpu {
namespace {

constexpr int64_t kRows = 6, kCols = 16, kDepth = 256;

// out[p][i] = src(i, p), zero-filled to `width`
void pack(const float* src, int64_t outer_stride, int64_t depth_stride, int64_t count,
          int64_t depth, int64_t width, float* out) {
  for (int64_t p = 0; p < depth; ++p)
    for (int64_t i = 0; i < width; ++i)
      out[p * width + i] = i < count ? src[i * outer_stride + p * depth_stride] : 0.0f;
}

// GCC's vector type: eight floats on any machine, one register where there is AVX.
using Vec = float __attribute__((vector_size(32), aligned(4), may_alias));

void micro_kernel(int64_t depth, const float* __restrict a, const float* __restrict b,
                  float* __restrict out) {
  Vec acc[kRows][2] = {};
  for (int64_t p = 0; p < depth; ++p, a += kRows, b += kCols) {
    const Vec b0 = *reinterpret_cast<const Vec*>(b), b1 = *reinterpret_cast<const Vec*>(b + 8);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
      acc[i][0] += a[i] * b0;
      acc[i][1] += a[i] * b1;
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kRows; ++i) {
    *reinterpret_cast<Vec*>(out + i * kCols) = acc[i][0];
    *reinterpret_cast<Vec*>(out + i * kCols + 8) = acc[i][1];
  }
}

}  // namespace

void gemm_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col,
               const float* b, int64_t b_row, int64_t b_col, float* c, int64_t c_row,
               bool accumulate) {
  static thread_local std::vector<float> packed_a, packed_b;
  const int64_t row_blocks = (m + kRows - 1) / kRows, col_blocks = (n + kCols - 1) / kCols;
  if (!accumulate)
    for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * c_row, n, 0.0f);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, k - k0);
    packed_a.resize(static_cast<size_t>(row_blocks * kRows * depth));
    packed_b.resize(static_cast<size_t>(col_blocks * kCols * depth));
    for (int64_t i = 0; i < row_blocks; ++i)
      pack(a + i * kRows * a_row + k0 * a_col, a_row, a_col, std::min(kRows, m - i * kRows), depth,
           kRows, packed_a.data() + i * kRows * depth);
    for (int64_t j = 0; j < col_blocks; ++j)
      pack(b + j * kCols * b_col + k0 * b_row, b_col, b_row, std::min(kCols, n - j * kCols), depth,
           kCols, packed_b.data() + j * kCols * depth);
    for (int64_t j = 0; j < col_blocks; ++j)
      for (int64_t i = 0; i < row_blocks; ++i) {
        float tile[kRows * kCols];
        micro_kernel(depth, packed_a.data() + i * kRows * depth,
                     packed_b.data() + j * kCols * depth, tile);
        const int64_t rows = std::min(kRows, m - i * kRows), cols = std::min(kCols, n - j * kCols);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t s = 0; s < cols; ++s)
            c[(i * kRows + r) * c_row + j * kCols + s] += tile[r * kCols + s];
      }
  }
}

void gemm_tile(int64_t, int64_t, int64_t, const bf16_t*, int64_t, int64_t, const bf16_t*, int64_t,
               int64_t, float*, int64_t, bool) {
  fail("gemm: this build has no bf16 product");
}
bool gemm_has_bf16() { return false; }

const char* gemm_name() { return "built-in"; }

}  // namespace omq::cpu
