// Around the product of many rows of codes with packed weights of one group a row, in int8 (GPU
// half of packed_matmul_rows). With c′ = c − o, o the offset that makes a code of b bits fit a
// signed byte (128 for 8 bits, else 0), and z′ = z − o:
//
//   Σ (cx − zx)(cw − zw) = Σ cx′ cw′ − zw′ Σ cx′ − zx′ Σ cw′ + K zx′ zw′
//
// all of it exact in 32 bits for K ≤ 32768. Bytes: codes read and written once on each side, the
// sums read once, y written once.
#include "cuda/packed.h"
#include "cuda/packed_kernels.cuh"

namespace omq::cuda {
namespace {

constexpr int kThreads = 256;
__host__ __device__ constexpr int offset_of(int bits) { return bits == 8 ? 128 : 0; }

__device__ __forceinline__ int byte_sum(uint32_t signed_bytes, int before) {
  return __dp4a(static_cast<int>(signed_bytes), 0x01010101, before);
}

// A warp a row; sixteen codes a lane at a time. y: null where codes are signed bytes as they stand.
__global__ void signed_rows_kernel(uint4* y, int32_t* sums, const uint4* codes, int64_t rows,
                                   int64_t packs, uint32_t flip) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = grid_index() / 32; row < rows; row += grid_stride() / 32) {
    int sum = 0;
#pragma unroll 4
    for (int64_t i = lane; i < packs; i += 32) {
      uint4 v = codes[row * packs + i];
      v = make_uint4(v.x ^ flip, v.y ^ flip, v.z ^ flip, v.w ^ flip);
      if (y) y[row * packs + i] = v;
      sum = byte_sum(v.x, byte_sum(v.y, byte_sum(v.z, byte_sum(v.w, sum))));
    }
    sum = team_sum<32>(sum);
    if (lane == 0) sums[row] = sum;
  }
}

// A block a panel: its 16 rows of y [N, K] as signed bytes, and their sums. A warp takes every
// eighth unit; a lane's bytes of a row stand together and are stored at most 16 at a time.
template <int kBits, int kUnit>
__global__ void __launch_bounds__(kThreads)
    signed_units_kernel(uint8_t* y, int32_t* sums, PackedView v) {
  constexpr int kWords = unit_words(kBits, kUnit), kFours = kUnit / 16;
  constexpr uint32_t kFlip = kBits == 8 ? 0x80808080u : 0;
  using Store = std::conditional_t<kFours == 2, uint2, uint4>;
  constexpr int kEach = sizeof(Store) / 4;  // fours of a store
  __shared__ int parts[16][kThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int r = lane / 4, q = lane % 4, panel = static_cast<int>(blockIdx.x);
  const uint32_t* units =
      reinterpret_cast<const uint32_t*>(v.codes) + int64_t{panel} * v.units * (kWords * 32);
  int sum[2] = {};
#pragma unroll 2
  for (int k = warp; k < v.units; k += kThreads / 32) {
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      words[i] = units[k * (kWords * 32) + word_offset(kWords, i, lane)];
    const int col = k * kUnit + q * (kUnit / 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = panel * 16 + r + 8 * half;
      uint32_t four[kFours];
#pragma unroll
      for (int f = 0; f < kFours; ++f) four[f] = four_codes<kBits, kUnit>(words, half, f) ^ kFlip;
#pragma unroll
      for (int f = 0; f < kFours; f += kEach) {
        if (row >= v.rows || col + 4 * f >= v.cols) continue;
        Store out;
        memcpy(&out, four + f, sizeof out);
        *reinterpret_cast<Store*>(y + static_cast<int64_t>(row) * v.cols + col + 4 * f) = out;
#pragma unroll
        for (int e = 0; e < kEach; ++e) sum[half] = byte_sum(four[f + e], sum[half]);
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

// Eight neighbours of a column block a thread, of kRowsEach rows, so that what belongs to columns
// is read once for them.
constexpr int kRowsEach = 4;
struct Finish {
  const int32_t *sums, *x_sums, *w_sums;  // [T, N], [T], [N]
  const float2* x_grid;                   // [T]: scale, zero
  const GridWord* w_grid;                 // [N]
  int64_t rows, cols;                     // T, N
  int depth, x_offset, w_offset;          // K
};

__global__ void __launch_bounds__(kThreads) finish_kernel(Operand y, Finish f) {
  const int64_t packs = f.cols / kPack, row_blocks = (f.rows + kRowsEach - 1) / kRowsEach;
  for (int64_t i = grid_index(); i < row_blocks * packs; i += grid_stride()) {
    const int64_t block = divide(i, packs), pack = i - block * packs;
    int ws[kPack], zw[kPack];
    float scale[kPack];
    int4 s[kRowsEach][2];
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r)
      if (const int64_t row = block * kRowsEach + r; row < f.rows)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          s[r][h] = reinterpret_cast<const int4*>(f.sums + row * f.cols)[pack * 2 + h];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int4 w = reinterpret_cast<const int4*>(f.w_sums)[pack * 2 + h];
      const uint4 g = reinterpret_cast<const uint4*>(f.w_grid)[pack * 2 + h];
      const int sums[4] = {w.x, w.y, w.z, w.w};
      const GridWord grids[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        ws[4 * h + j] = sums[j];
        zw[4 * h + j] = grid_zero(grids[j]) - f.w_offset;
        scale[4 * h + j] = grid_scale(grids[j]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r) {
      const int64_t row = block * kRowsEach + r;
      if (row >= f.rows) break;
      const float2 grid = f.x_grid[row];
      const int zx = static_cast<int>(grid.y) - f.x_offset, xs = f.x_sums[row];
      Pack out;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const int4& v = s[r][j / 4];
        const int sum = j % 4 == 0 ? v.x : j % 4 == 1 ? v.y : j % 4 == 2 ? v.z : v.w;
        const int exact = sum - zw[j] * xs - zx * ws[j] + f.depth * zx * zw[j];
        out.v[j] = static_cast<float>(exact) * (grid.x * scale[j]);
      }
      store_pack(y, row * packs + pack, out);
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

// The same bytes.
Tensor as_signed(const Tensor& codes) {
  const auto* begin = static_cast<const std::byte*>(codes.storage()->data());
  const auto at = static_cast<const std::byte*>(codes.raw()) - begin;
  return Tensor::view(codes.storage(), static_cast<size_t>(at), codes.shape(), DType::I8);
}

}  // namespace

void integer_matmul(Tensor& y, const QuantizedRows& x, const PackedInt& w) {
  const PackedView v = view_of("packed_matmul_rows", w);
  const int64_t rows = x.codes.dim(0), cols = w.cols;
  const Device device = y.device();
  check(x.codes.is_contiguous() && aligned16(x.codes.raw()) && x.grid.is_contiguous() &&
            !x.paired && y.is_contiguous(),
        "packed_matmul_rows: codes {} are not one a byte, row by row", x.codes.shape());
  const bool flipped = x.spec.bits == 8;  // else no code reaches the sign
  Tensor left = flipped ? Tensor::empty({rows, cols}, DType::I8, device) : as_signed(x.codes),
         right = Tensor::empty({w.rows, cols}, DType::I8, device),
         sums = Tensor::empty({rows, w.rows}, DType::I32, device),
         x_sums = Tensor::empty({rows}, DType::I32, device),
         w_sums = Tensor::empty({w.rows}, DType::I32, device);
  launch("packed_matmul_rows", y, signed_rows_kernel, blocks_for(rows, kThreads / 32), kThreads, 0,
         flipped ? static_cast<uint4*>(left.raw()) : nullptr, x_sums.data<int32_t>(),
         static_cast<const uint4*>(x.codes.raw()), rows, cols / 16, flipped ? 0x80808080u : 0u);
  with_layout(v, [&](auto bits, auto unit) {
    launch("packed_matmul_rows", y,
           signed_units_kernel<decltype(bits)::value, decltype(unit)::value>,
           dim3(static_cast<unsigned>(v.panels)), kThreads, 0, static_cast<uint8_t*>(right.raw()),
           w_sums.data<int32_t>(), v);
  });
  matmul(sums, left, right.alias({cols, w.rows}, {1, cols}, 0));
  const Finish f{sums.data<int32_t>(),
                 x_sums.data<int32_t>(),
                 w_sums.data<int32_t>(),
                 reinterpret_cast<const float2*>(x.grid.data<float>()),
                 v.grids,
                 rows,
                 w.rows,
                 static_cast<int>(cols),
                 offset_of(x.spec.bits),
                 offset_of(v.bits)};
  launch("packed_matmul_rows", y, finish_kernel,
         blocks_for((rows + kRowsEach - 1) / kRowsEach * (w.rows / kPack), kThreads), kThreads, 0,
         operand("packed_matmul_rows", y), f);
}

}  // namespace omq::cuda
