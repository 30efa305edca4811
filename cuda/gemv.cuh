// What the kernels for a few rows of activations share: the rows on their way into shared memory,
// normed and rounded where that is asked for, and the rows of the result on their way out.
//
// Every block prepares all of x by itself: a few KiB from the L2 cache cost less than a kernel of
// their own and the wait for it.
#pragma once

#include "cuda/packed_kernels.cuh"
#include "tensor/decode_kernels.h"
#include "tensor/row_quant.h"

namespace omq::cuda {

constexpr int kGemvThreads = 512, kGemvWarps = kGemvThreads / 32;
constexpr int kMaxMatrices = 3;

struct GemvInput {
  const float* x = nullptr;        // [rows, cols], or
  const uint8_t* codes = nullptr;  // the same as codes, with
  const float2* grid = nullptr;    // scale and zero of each row
  const float *gain = nullptr, *shift = nullptr;
  float eps = 0;
  int rows = 0, cols = 0;
  bool quantise = false, by_fours = false;  // by_fours: columns may be read four at a time
  RowQuant s;
};

struct GemvMatrix {
  const void* data = nullptr;  // codes, or rows of a dense matrix
  const __half2* grids = nullptr;
  const float* bias = nullptr;
  float* y = nullptr;  // [rows of x, y_stride]
  int rows = 0, panels = 0;
};

struct GemvArgs {
  GemvInput in;
  GemvMatrix m[kMaxMatrices];
  int matrices = 0;
  RowOutput output = RowOutput::Store;
  int64_t y_stride = 0;
  int work = 0;       // panels (or row pairs) of all matrices; pairs of panels for SiluMul
  int per_round = 0;  // panels whose sums fit the shared memory together
  int units = 0, units_per_group = 1, groups = 1, x_stride = 0;
};

// Four neighbouring columns c … c + 3 of row n, normed; 0 past the end.
__device__ __forceinline__ float4 load_columns(const GemvInput& in, int n, int c, float r) {
  if (in.codes) {
    const uint8_t* p = in.codes + static_cast<int64_t>(n) * in.cols + c;
    const float zero = in.grid[n].y;
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = c + j < in.cols ? static_cast<float>(p[j]) - zero : 0.0f;
    return make_float4(v[0], v[1], v[2], v[3]);
  }
  const float* p = in.x + static_cast<int64_t>(n) * in.cols + c;
  if (in.by_fours) {
    if (c >= in.cols) return float4{};
    float4 v = __ldcg(reinterpret_cast<const float4*>(p));
    if (!in.gain) return v;
    const float4 g = *reinterpret_cast<const float4*>(in.gain + c);
    v = make_float4(v.x * r * g.x, v.y * r * g.y, v.z * r * g.z, v.w * r * g.w);
    if (!in.shift) return v;
    const float4 b = *reinterpret_cast<const float4*>(in.shift + c);
    return make_float4(v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w);
  }
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    v[j] = c + j < in.cols ? p[j] : 0.0f;
    if (in.gain && c + j < in.cols)
      v[j] = v[j] * r * in.gain[c + j] + (in.shift ? in.shift[c + j] : 0.0f);
  }
  return make_float4(v[0], v[1], v[2], v[3]);
}

// Calls f(c, value of columns c … c + 3) so that each warp takes 128 neighbouring columns at a
// time, lane l four of them, up to `columns` (a multiple of 128).
template <class F>
__device__ __forceinline__ void for_columns(const GemvInput& in, int n, float r, int columns,
                                            F&& f) {
#pragma unroll 2
  for (int c = 4 * static_cast<int>(threadIdx.x); c < columns; c += 4 * kGemvThreads)
    f(c, load_columns(in, n, c, r));
}

// Every row of x: put(n, c, values of columns c … c + 3), to be multiplied by scales[n] afterwards;
// columns past the end are 0. To be called by all of the block,
// before a barrier of the caller.
template <class Put>
__device__ __forceinline__ void stage_input(const GemvInput& in, float* scales, Put&& put) {
  const int columns = (in.cols + 127) / 128 * 128;
  for (int n = 0; n < in.rows; ++n) {
    if (in.codes) {
      for_columns(in, n, 1.0f, columns, [&](int c, float4 v) { put(n, c, v); });
      if (threadIdx.x == 0) scales[n] = in.grid[n].x;
      continue;
    }
    float r = 1;
    if (in.gain) {
      GemvInput plain = in;
      plain.gain = nullptr;
      float squares = 0;
      for_columns(plain, n, 1.0f, columns,
                  [&](int, float4 v) { squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; });
      squares = team_sum<kGemvThreads>(squares);
      r = 1.0f / sqrtf(squares / static_cast<float>(in.cols) + in.eps);
    }
    if (!in.quantise) {
      for_columns(in, n, r, columns, [&](int c, float4 v) { put(n, c, v); });
      if (threadIdx.x == 0) scales[n] = 1;
      continue;
    }
    float hi = -INFINITY, lo = -INFINITY;  // lo: the largest of −v; NaN stays
    const auto see = [&](float v) {
      hi = v > hi || v != v ? v : hi;
      lo = -v > lo || v != v ? -v : lo;
    };
    for_columns(in, n, r, columns, [&](int c, float4 v) {
      if (c < in.cols) see(v.x);
      if (c + 1 < in.cols) see(v.y);
      if (c + 2 < in.cols) see(v.z);
      if (c + 3 < in.cols) see(v.w);
    });
    hi = team_max<kGemvThreads>(hi);
    lo = -team_max<kGemvThreads>(lo);
    const RowGrid<float> g = row_grid(hi, lo, in.s);
    const float top = static_cast<float>((1 << in.s.bits) - 1);
    // Whole numbers, unless the zero point is none of the codes and may be large.
    const float inside = in.s.include_zero ? 1.0f : g.scale;
    for_columns(in, n, r, columns, [&](int c, float4 v) {
      const auto coded = [&](float x, int j) {
        return c + j < in.cols ? (row_code(x, g, top) - g.zero) * inside : 0.0f;
      };
      put(n, c, make_float4(coded(v.x, 0), coded(v.y, 1), coded(v.z, 2), coded(v.w, 3)));
    });
    if (threadIdx.x == 0) scales[n] = in.s.include_zero ? g.scale : 1.0f;
  }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Which matrix and which of its panels (or rows) stands at `at` among all of them.
__device__ __forceinline__ int find_matrix(const GemvArgs& a, int& at) {
  int i = 0;
  while (i + 1 < a.matrices && at >= a.m[i].panels) at -= a.m[i++].panels;
  return i;
}

// y of packed (all of one layout) or dense (all of one dtype) matrices; rows first … of x.
void packed_gemv(Tensor& y, GemvArgs a, std::span<const RowMatrix> matrices);
void dense_gemv(Tensor& y, GemvArgs a, std::span<const RowMatrix> matrices);

}  // namespace omq::cuda
