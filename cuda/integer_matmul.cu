// Around the product of many rows of codes with packed weights of one group a row, in int8 (GPU
// half of packed_matmul_rows). With c′ = c − o, o the offset that makes a code of b bits fit a
// signed byte (128 for 8 bits, else 0), and z′ = z − o:
//
//   Σ (cx − zx)(cw − zw) = Σ cx′ cw′ − zw′ Σ cx′ − zx′ Σ cw′ + K zx′ zw′
//
// all of it exact in 32 bits for K ≤ 32768. Whoever quantises x writes cx′ and its sums
// (row_codes.cu). Bytes: weights read and written once, cx′ read once, the sums read once, y
// written once.
#include "cuda/code_bytes.cuh"
#include "cuda/packed.h"
#include "cuda/packed_kernels.cuh"
#include "tensor/elementwise.h"

namespace omq::cuda {
namespace {

constexpr int kThreads = 256;

// A block a panel: its 16 rows of y [N, K] as signed bytes, and their sums. A warp takes every
// eighth unit; a lane stores eight neighbouring bytes of a row at a time.
template <int kBits, int kUnit>
__global__ void __launch_bounds__(kThreads)
    signed_units_kernel(uint8_t* y, int32_t* sums, PackedView v) {
  constexpr int kWords = unit_words(kBits, kUnit), kFours = kUnit / 16;
  constexpr uint32_t kFlip = kBits == 8 ? 0x80808080u : 0;
  __shared__ int parts[16][kThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int r = lane / 4, q = lane % 4, panel = static_cast<int>(blockIdx.x);
  const uint32_t* units =
      reinterpret_cast<const uint32_t*>(v.codes) + int64_t{panel} * v.units * (kWords * 32);
  int sum[2] = {};
#pragma unroll 4
  for (int k = warp; k < v.units; k += kThreads / 32) {
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      words[i] = units[k * (kWords * 32) + word_offset(kWords, i, lane)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = panel * 16 + r + 8 * half;
      uint32_t four[kFours];
#pragma unroll
      for (int f = 0; f < kFours; ++f) four[f] = four_codes<kBits, kUnit>(words, half, f) ^ kFlip;
#pragma unroll
      for (int f = 0; f < kFours; f += 2) {
        const int col = k * kUnit + four_column(q, f);
        if (row >= v.rows || col >= v.cols) continue;
        *reinterpret_cast<uint2*>(y + static_cast<int64_t>(row) * v.cols + col) =
            make_uint2(four[f], four[f + 1]);
        sum[half] = byte_sum(four[f + 1], byte_sum(four[f], sum[half]));
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    if (q == 0) parts[r + 8 * half][warp] = sum[half];
  }
  __syncthreads();
  if (threadIdx.x >= 16 || panel * 16 + static_cast<int>(threadIdx.x) >= v.rows) return;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) all += parts[threadIdx.x][w];
  sums[panel * 16 + threadIdx.x] = all;
}

// One product's sums and what they stand for.
struct Finish {
  const int32_t *sums, *w_sums;  // [T, N], [N]
  const GridWord* w_grid;        // [N]
  int w_offset;
};
struct FinishRows {
  const int32_t* x_sums;  // [T]
  const float2* x_grid;   // [T]: scale, zero
  int64_t rows, cols;     // T, N
  int depth, x_offset;    // K
};

// Four neighbouring columns of kRowsEach rows a thread: what belongs to columns is read once for
// them, and the lanes of a warp read and write side by side.
constexpr int kRowsEach = 8, kColsEach = 4;

// A thread's columns of a product.
struct Columns {
  int4 s[kRowsEach];
  int ws[kColsEach], zw[kColsEach];
  float scale[kColsEach];
  __device__ __forceinline__ void load(const Finish& f, int64_t first, int64_t rows, int64_t fours,
                                       int64_t four) {
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r)
      if (first + r < rows)
        s[r] = reinterpret_cast<const int4*>(f.sums)[(first + r) * fours + four];
    const int4 w = reinterpret_cast<const int4*>(f.w_sums)[four];
    const uint4 g = reinterpret_cast<const uint4*>(f.w_grid)[four];
    const int sums[kColsEach] = {w.x, w.y, w.z, w.w};
    const GridWord grids[kColsEach] = {g.x, g.y, g.z, g.w};
#pragma unroll
    for (int j = 0; j < kColsEach; ++j) {
      ws[j] = sums[j];
      zw[j] = grid_zero(grids[j]) - f.w_offset;
      scale[j] = grid_scale(grids[j]);
    }
  }
  // Row r, whose x has scale and zero point zx, and whose codes' sum is xs.
  __device__ __forceinline__ void row(float (&out)[kColsEach], int r, float x_scale, int zx, int xs,
                                      int depth) const {
    const int sums[kColsEach] = {s[r].x, s[r].y, s[r].z, s[r].w};
#pragma unroll
    for (int j = 0; j < kColsEach; ++j) {
      const int exact = sums[j] - zw[j] * xs - zx * ws[j] + depth * zx * zw[j];
      out[j] = static_cast<float>(exact) * (x_scale * scale[j]);
    }
  }
};

__device__ __forceinline__ void store_four(Operand y, int64_t i, const float (&v)[kColsEach]) {
  if (y.dtype == DType::F32)
    static_cast<float4*>(y.data)[i] = make_float4(v[0], v[1], v[2], v[3]);
  else
    static_cast<uint2*>(y.data)[i] =
        make_uint2(two_16bit(v[0], v[1], y.dtype), two_16bit(v[2], v[3], y.dtype));
}

// y: the product a; kGated: silu(a) ⊙ b.
template <bool kGated>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Operand y, FinishRows of, Finish a, Finish b) {
  const int64_t fours = of.cols / kColsEach, row_blocks = (of.rows + kRowsEach - 1) / kRowsEach;
  for (int64_t i = grid_index(); i < row_blocks * fours; i += grid_stride()) {
    const int64_t block = divide(i, fours), four = i - block * fours, first = block * kRowsEach;
    Columns left, right;
    left.load(a, first, of.rows, fours, four);
    if constexpr (kGated) right.load(b, first, of.rows, fours, four);
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r) {
      const int64_t row = first + r;
      if (row >= of.rows) break;
      const float2 grid = of.x_grid[row];
      const int zx = static_cast<int>(grid.y) - of.x_offset, xs = of.x_sums[row];
      float out[kColsEach];
      left.row(out, r, grid.x, zx, xs, of.depth);
      if constexpr (kGated) {
        float up[kColsEach];
        right.row(up, r, grid.x, zx, xs, of.depth);
#pragma unroll
        for (int j = 0; j < kColsEach; ++j) out[j] = fn::Silu{}.fwd(out[j]) * up[j];
      }
      store_four(y, row * fours + four, out);
    }
  }
}

}  // namespace

// ---- launchers ----

bool integer_matmul_takes(const PackedInt& w) {
  // Whole 16-byte rows for cuBLASLt; no sum of products leaves 31 bits.
  return w.groups() == 1 && w.cols % 16 == 0 && w.rows % 16 == 0 && w.cols <= 32768;
}

namespace {

// Σ of the products of x's codes with w's, and what is needed beside them. The tensors live as long
// as this.
struct Sums {
  Tensor sums, w_sums;  // I32 [T, N], [N]
  Finish finish;
  Sums(const QuantizedRows& x, const PackedInt& w) {
    const PackedView v = view_of("packed_matmul_rows", w);
    const Device device = x.codes.device();
    check(x.as_signed() && x.codes.is_contiguous() && aligned16(x.codes.raw()) &&
              x.grid.is_contiguous(),
          "packed_matmul_rows: codes {} are not signed bytes, row by row", x.codes.shape());
    Tensor right = Tensor::empty({w.rows, w.cols}, DType::I8, device);
    sums = Tensor::empty({x.codes.dim(0), w.rows}, DType::I32, device);
    w_sums = Tensor::empty({w.rows}, DType::I32, device);
    with_layout(v, [&](auto bits, auto unit) {
      launch("signed_units", sums,
             signed_units_kernel<decltype(bits)::value, decltype(unit)::value>,
             dim3(static_cast<unsigned>(v.panels)), kThreads, 0, static_cast<uint8_t*>(right.raw()),
             w_sums.data<int32_t>(), v);
    });
    matmul(sums, x.codes, right.alias({w.cols, w.rows}, {1, w.cols}, 0));
    finish = {sums.data<int32_t>(), w_sums.data<int32_t>(), v.grids, signed_offset(v.bits)};
  }
};

template <bool kGated>
void finish_sums(Tensor& y, const QuantizedRows& x, const Finish& a, const Finish& b) {
  check(y.is_contiguous(), "packed_matmul_rows: y {} is not contiguous", y.shape());
  const FinishRows of{x.sums.data<int32_t>(),
                      reinterpret_cast<const float2*>(x.grid.data<float>()),
                      y.dim(0),
                      y.dim(1),
                      static_cast<int>(x.cols),
                      signed_offset(x.spec.bits)};
  launch("integer_sums", y, finish_kernel<kGated>,
         blocks_for((of.rows + kRowsEach - 1) / kRowsEach * (of.cols / kColsEach), kThreads),
         kThreads, 0, operand("packed_matmul_rows", y), of, a, b);
}

}  // namespace

void integer_matmul(Tensor& y, const QuantizedRows& x, const PackedInt& w) {
  const Sums s(x, w);
  finish_sums<false>(y, x, s.finish, {});
}

void integer_gated(Tensor& y, const QuantizedRows& x, const PackedInt& gate, const PackedInt& up) {
  const Sums left(x, gate), right(x, up);
  finish_sums<true>(y, x, left.finish, right.finish);
}

}  // namespace omq::cuda
