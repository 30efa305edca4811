// A row of activations as packed_row.cu multiplies it: whole numbers of two bytes, 32 neighbouring
// columns to a scale. A block can make it of F32 itself; where the kernel in front is one of ours,
// that leaves it ready, so that 132 blocks need not make the same 11 008 numbers.
//
//   bytes    hi bytes of 64 columns, then their lo bytes (v = scale · (256 hi + lo)): each as in
//            PlanePlace, 16 of lane q = 0 … 3, columns 8q … 8q + 7 of either 32
//   scales   of every 32 columns, with minus the sum of their values, which zero points meet
//   squares  of every 32 columns, summed before the gain, where an RMSNorm stands between
//
// Columns are padded with zeros to a multiple of what a warp multiplies at a time.
#pragma once

#include "cuda/packed_layout.cuh"
#include "cuda/whole_scale.cuh"

namespace omq::cuda {

constexpr int kScaleColumns = 32;

struct alignas(8) RowScale {
  float scale;
  float minus_sum;  // of the values
};

struct PreparedRow {
  char* bytes;
  RowScale* scales;
  float* squares;

  static constexpr int kPadding = 512;
  static constexpr __host__ __device__ int padded(int cols) {
    return (cols + kPadding - 1) / kPadding * kPadding;
  }
  // Of `padded` columns, squares included; a multiple of 16.
  static constexpr __host__ __device__ int size(int padded) {
    return 2 * padded + padded / kScaleColumns * static_cast<int>(sizeof(RowScale) + sizeof(float));
  }
  // Where the hi byte of column c stands; its lo byte is kLoAfter behind.
  static constexpr int kLoAfter = PlanePlace<64>::lo_after;
  static __host__ __device__ __forceinline__ int hi(int c) {
    return c / 64 * 128 + PlanePlace<64>::hi(c % 64);
  }

  __host__ __device__ PreparedRow(char* memory, int padded)
      : bytes(memory),
        scales(reinterpret_cast<RowScale*>(memory + 2 * padded)),
        squares(reinterpret_cast<float*>(scales + padded / kScaleColumns)) {}

  // Column c is v, in the warp's lane c % 32; all lanes call, with the columns of one scale.
  __device__ __forceinline__ void put(int c, float v) const {
    const WholeScale whole(__reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(v))));
    const uint32_t i = whole.bits(v, WholeScale::kRound),
                   above = whole.bits(v, WholeScale::kRound + 128);
    bytes[hi(c)] = static_cast<char>(above >> 8);
    bytes[hi(c) + kLoAfter] = static_cast<char>(i);
    const int sum = __reduce_add_sync(0xffffffffu, static_cast<int>(i - WholeScale::kRoundBits));
    if (c % 32 == 0) scales[c / 32] = {whole.scale, -static_cast<float>(sum) * whole.scale};
  }
};

}  // namespace omq::cuda
