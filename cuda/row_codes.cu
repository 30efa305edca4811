// Rows of activations as codes, and back: what products of codes with codes and the key/value cache
// read. The grid of a row is that of tensor/row_quant.h, so codes equal the CPU's bit for bit.
//
// A warp a row. Bytes: x once (again from the cache), codes once.
#include "cuda/common.cuh"
#include "tensor/row_quant.h"

namespace omq::cuda {
namespace {

struct Rows {  // leading dims of a tensor with contiguous rows
  int64_t size[3], stride[3];
  __host__ __device__ int64_t at(int64_t row) const {
    const int64_t c = row % size[2], b = row / size[2] % size[1], a = row / size[2] / size[1];
    return a * stride[0] + b * stride[1] + c * stride[2];
  }
};

Rows rows_view(const char* op, const Tensor& x) {
  check(x.ndim() >= 1 && x.ndim() <= 4 && (x.shape().back() == 1 || x.stride(-1) == 1),
        "{}: rows of {} are not contiguous", op, x.shape());
  Rows r{{1, 1, 1}, {0, 0, 0}};
  for (int i = 0; i < x.ndim() - 1; ++i) {
    r.size[4 - x.ndim() + i] = x.dim(i);
    r.stride[4 - x.ndim() + i] = x.stride(i);
  }
  return r;
}

template <class T>
__global__ void quantize_rows_kernel(uint8_t* codes, Rows code_rows, float* grid, Rows grid_rows,
                                     const T* x, Rows x_rows, int64_t rows, int n, RowQuant s,
                                     bool paired) {
  const float top = static_cast<float>((1 << s.bits) - 1);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = grid_index() / 32; row < rows; row += grid_stride() / 32) {
    const T* values = x + x_rows.at(row);
    const auto from = [values](int i) { return static_cast<float>(values[i]); };
    float hi = -INFINITY, lo = -INFINITY;
    int finite = 1;
    for (int i = lane; i < n; i += 32) {
      const float v = from(i);
      hi = fmaxf(hi, v);
      lo = fmaxf(lo, -v);
      finite &= isfinite(v);
    }
    hi = team_max<32>(hi);
    lo = -team_max<32>(lo);
    finite = __all_sync(0xffffffffu, finite);
    const RowGrid<float> g = row_grid(hi, lo, s);
    uint8_t* to = codes + code_rows.at(row);
    const auto code = [&](int i) {
      return finite && i < n ? static_cast<uint8_t>(row_code(from(i), g, top)) : uint8_t{0};
    };
    if (paired)
      for (int i = lane; i < (n + 1) / 2; i += 32)
        to[i] = static_cast<uint8_t>(code(2 * i) | code(2 * i + 1) << 4);
    else
      for (int i = lane; i < n; i += 32) to[i] = code(i);
    if (lane == 0) {
      float* out = grid + grid_rows.at(row);
      out[0] = finite ? g.scale : __int_as_float(0x7fc00000);
      out[1] = finite ? g.zero : 0.0f;
    }
  }
}

// A block a row of halves that stand one behind another, eight a thread at a time, read once: what
// a prompt's products ask for. n: a multiple of 8, at most kRowThreads · 8 · kHeldPacks.
constexpr int kHeldPacks = 6;
__global__ void __launch_bounds__(kRowThreads)
    quantize_whole_rows_kernel(uint8_t* codes, float2* grid, Operand x, int64_t rows, int n,
                               RowQuant s) {
  const float top = static_cast<float>((1 << s.bits) - 1);
  const int packs = n / kPack;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    Raw raw[kHeldPacks];
#pragma unroll
    for (int j = 0; j < kHeldPacks; ++j)
      if (const int i = static_cast<int>(threadIdx.x) + j * kRowThreads; i < packs)
        raw[j] = load_raw(x, row * packs + i);
    float hi = -INFINITY, lo = -INFINITY;
    int finite = 1;
#pragma unroll
    for (int j = 0; j < kHeldPacks; ++j) {
      if (static_cast<int>(threadIdx.x) + j * kRowThreads >= packs) continue;
      const Pack v = unpack(raw[j], x.dtype);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        hi = fmaxf(hi, v.v[k]);
        lo = fmaxf(lo, -v.v[k]);
        finite &= isfinite(v.v[k]);
      }
    }
    hi = team_max<kRowThreads>(hi);
    lo = -team_max<kRowThreads>(lo);
    finite = __syncthreads_and(finite);
    const RowGrid<float> g = row_grid(hi, lo, s);
#pragma unroll
    for (int j = 0; j < kHeldPacks; ++j) {
      const int i = static_cast<int>(threadIdx.x) + j * kRowThreads;
      if (i >= packs) continue;
      const Pack v = unpack(raw[j], x.dtype);
      uint32_t out[2] = {};
#pragma unroll
      for (int k = 0; k < kPack; ++k)
        out[k / 4] |= (finite ? static_cast<uint32_t>(row_code(v.v[k], g, top)) : 0u)
                      << (k % 4 * 8);
      reinterpret_cast<uint2*>(codes)[row * packs + i] = make_uint2(out[0], out[1]);
    }
    if (threadIdx.x == 0)
      grid[row] =
          finite ? make_float2(g.scale, g.zero) : make_float2(__int_as_float(0x7fc00000), 0.0f);
  }
}

__global__ void dequantize_rows_kernel(float* y, Rows y_rows, const uint8_t* codes, Rows code_rows,
                                       const float* grid, Rows grid_rows, int64_t rows, int n,
                                       bool paired) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = grid_index() / 32; row < rows; row += grid_stride() / 32) {
    const uint8_t* from = codes + code_rows.at(row);
    const float* g = grid + grid_rows.at(row);
    const float scale = g[0], zero = g[1];
    float* to = y + y_rows.at(row);
    for (int i = lane; i < n; i += 32) {
      const int code = paired ? from[i / 2] >> (i % 2 * 4) & 15 : from[i];
      to[i] = (static_cast<float>(code) - zero) * scale;
    }
  }
}

constexpr int kThreads = 256;

}  // namespace

// ---- launchers ----

void quantize_rows(QuantizedRows& q, const Tensor& x) {
  const int64_t rows = rows_of(x);
  const auto run = [&](const auto* values, auto kernel) {
    launch("quantize_rows", x, kernel, blocks_for(rows, kThreads / 32), kThreads, 0,
           q.codes.data<uint8_t>(), rows_view("quantize_rows", q.codes), q.grid.data<float>(),
           rows_view("quantize_rows", q.grid), values, rows_view("quantize_rows", x), rows, q.cols,
           q.spec, q.paired);
  };
  const Operand in = operand("quantize_rows", x);
  if (x.dtype() == DType::F16 && !q.paired && x.is_contiguous() && q.codes.is_contiguous() &&
      q.grid.is_contiguous() && in_packs(q.cols, in) && q.cols <= kRowThreads * kPack * kHeldPacks)
    return launch("quantize_rows", x, quantize_whole_rows_kernel, blocks_for(rows, 1), kRowThreads,
                  0, q.codes.data<uint8_t>(), reinterpret_cast<float2*>(q.grid.data<float>()), in,
                  rows, static_cast<int>(q.cols), q.spec);
  if (x.dtype() == DType::F16)
    return run(static_cast<const __half*>(x.raw()), quantize_rows_kernel<__half>);
  run(x.data<float>(), quantize_rows_kernel<float>);
}

void dequantize_rows(Tensor& y, const QuantizedRows& q) {
  const int64_t rows = rows_of(y);
  launch("dequantize_rows", y, dequantize_rows_kernel, blocks_for(rows, kThreads / 32), kThreads, 0,
         y.data<float>(), rows_view("dequantize_rows", y), q.codes.data<uint8_t>(),
         rows_view("dequantize_rows", q.codes), q.grid.data<float>(),
         rows_view("dequantize_rows", q.grid), rows, q.cols, q.paired);
}

}  // namespace omq::cuda
