// Tensor-core building blocks for the 16 × 8 × 16 product of 16-bit numbers with F32 sums: shared
// tiles, and fragments out of them.
//
// Shared tiles hold rows of D 16-bit numbers without padding; the 16-byte chunks of a row are
// permuted by its number (tile_address), so that eight rows of one column touch all banks once.
// Fragment layouts as in the PTX manual, "mma.m16n8k16": with g = lane / 4 and t = lane % 4,
//
//   A 16 × 16   a0 (g, 2t…)  a1 (g + 8, 2t…)  a2 (g, 2t + 8…)  a3 (g + 8, 2t + 8…)
//   B 16 × 8    b0 (2t…, g)  b1 (2t + 8…, g)
//   C 16 × 8    c0 c1 (g, 2t…)  c2 c3 (g + 8, 2t…)
//
// so that the C of one product, rounded to 16 bits, is the A of the next.
#pragma once

#include "cuda/ptx.cuh"

namespace omq::cuda {

// Byte address of 16-byte chunk `chunk` of row `row` in a tile of rows of D numbers (D a multiple
// of 64).
template <int D>
__device__ __forceinline__ uint32_t tile_address(uint32_t tile, int row, int chunk) {
  return tile + static_cast<uint32_t>(row * (D * 2) + ((chunk ^ (row & 7)) << 4));
}

// ---- fragments out of shared tiles ----
//
// A lane's address is (its own base ^ chunk · 16) + tile + row · 2 D: one base for each of the two
// patterns below serves every tile of a kernel, and only the exclusive or is not a constant of the
// instruction. This wants the shared memory and `tile` (bytes) to be multiples of 2 D, rows to be
// multiples of 8 and chunks even.

// The pattern of load_a and load_b_rows_k: lane l reads row l % 16, chunk l / 16.
template <int D> __device__ __forceinline__ uint32_t lane_rows(uint32_t shared, int lane) {
  return tile_address<D>(shared, lane & 15, lane >> 4);
}
// The pattern of load_b: rows 0 … 7 with chunks 0, 1, then rows 8 … 15.
template <int D> __device__ __forceinline__ uint32_t lane_cols(uint32_t shared, int lane) {
  return tile_address<D>(shared, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
template <int D>
__device__ __forceinline__ uint32_t lane_address(uint32_t base, uint32_t tile, int row, int chunk) {
  return (base ^ static_cast<uint32_t>(chunk << 4)) + tile + static_cast<uint32_t>(row * (D * 2));
}

// A: rows row … row + 15, columns of chunks chunk, chunk + 1.
template <int D>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t rows_base, uint32_t tile, int row,
                                       int chunk) {
  load_matrices(a, lane_address<D>(rows_base, tile, row, chunk));
}
// B of two neighbouring products, where the tile's rows are B's columns (n) and its columns k:
// rows row … row + 15. b[0], b[1] serve rows row …, b[2], b[3] rows row + 8 ….
template <int D>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t cols_base, uint32_t tile, int row,
                                       int chunk) {
  load_matrices(b, lane_address<D>(cols_base, tile, row, chunk));
}
// B of two neighbouring products, where the tile's rows are k: rows row … row + 15, columns of
// chunks chunk (b[0], b[1]) and chunk + 1 (b[2], b[3]).
template <int D>
__device__ __forceinline__ void load_b_rows_k(uint32_t (&b)[4], uint32_t rows_base, uint32_t tile,
                                              int row, int chunk) {
  load_matrices_transposed(b, lane_address<D>(rows_base, tile, row, chunk));
}

// C of two neighbouring products, rounded, as A: columns 0 … 15 of the next product.
template <class T>
__device__ __forceinline__ void round_to_a(uint32_t (&a)[4], const float (&left)[4],
                                           const float (&right)[4]) {
  a[0] = pack_pair(T{}, left[0], left[1]);
  a[1] = pack_pair(T{}, left[2], left[3]);
  a[2] = pack_pair(T{}, right[0], right[1]);
  a[3] = pack_pair(T{}, right[2], right[3]);
}

// Over the four lanes that share a row of C.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace omq::cuda
