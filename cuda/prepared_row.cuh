// A row of activations as packed_row.cu multiplies it: whole numbers of two bytes, 32 neighbouring
// columns to a scale. A block can make it of F32 itself; where the kernel in front is one of ours,
// that leaves it ready, so that 132 blocks need not make the same 11 008 numbers.
//
//   records  of 64 columns each: hi bytes, then lo bytes (v = scale · (256 hi + lo)), each as in
//            PlanePlace, 16 of lane q = 0 … 3, columns 8q … 8q + 7 of either 32; then the scale
//            of either 32, with minus the sum of their values, which zero points meet
//   squares  of every 32 columns, summed before the gain, where an RMSNorm stands between
//
// So what a warp multiplies at a time stands together. Columns are padded with zeros to a multiple
// of that.
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
  char* records;
  float* squares;

  static constexpr int kRecordColumns = 64, kScalesAt = 2 * kRecordColumns,
                       kRecord = kScalesAt + kRecordColumns / kScaleColumns * int{sizeof(RowScale)};
  static_assert(kRecord % 16 == 0);
  static constexpr int kPadding = 512;
  static constexpr __host__ __device__ int padded(int cols) {
    return (cols + kPadding - 1) / kPadding * kPadding;
  }
  // Bytes of `columns`, whole records, and with the squares; multiples of 16 where they are padded.
  static constexpr __host__ __device__ int bytes(int columns) {
    return columns / kRecordColumns * kRecord;
  }
  static constexpr __host__ __device__ int size(int padded) {
    return bytes(padded) + padded / kScaleColumns * int{sizeof(float)};
  }
  // Where the hi byte of column c stands; its lo byte is kLoAfter behind. And its scale.
  static constexpr int kLoAfter = PlanePlace<kRecordColumns>::lo_after;
  static __host__ __device__ __forceinline__ unsigned hi(unsigned c) {
    return c / kRecordColumns * kRecord +
           PlanePlace<kRecordColumns>::hi(static_cast<int>(c % kRecordColumns));
  }
  static __host__ __device__ __forceinline__ unsigned scale(unsigned c) {
    return c / kRecordColumns * kRecord + kScalesAt +
           c % kRecordColumns / kScaleColumns * unsigned{sizeof(RowScale)};
  }

  __host__ __device__ PreparedRow(char* memory, int padded)
      : records(memory), squares(reinterpret_cast<float*>(memory + bytes(padded))) {}

  // Column c is v, in the warp's lane c % 32; all lanes call, with the columns of one scale.
  __device__ __forceinline__ void put(int column, float v) const {
    const auto c = static_cast<unsigned>(column);
    const WholeScale whole(__reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(v))));
    const uint32_t i = whole.bits(v, WholeScale::kRound),
                   above = whole.bits(v, WholeScale::kRound + 128);
    char* at = records + hi(c);
    at[0] = static_cast<char>(above >> 8);
    at[kLoAfter] = static_cast<char>(i);
    const int sum = __reduce_add_sync(0xffffffffu, static_cast<int>(i - WholeScale::kRoundBits));
    if (c % kScaleColumns == 0)
      *reinterpret_cast<RowScale*>(records + scale(c)) = {whole.scale,
                                                          -static_cast<float>(sum) * whole.scale};
  }
};

}  // namespace omq::cuda
