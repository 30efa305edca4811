// What the forward and the backward of attention on tensor cores share: addresses, tile copies,
// constants.
#pragma once

#include "cuda/attention.h"
#include "cuda/mma.cuh"

namespace omq::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ const uint16_t* row_of(const HeadRows& x, int b, int row, int head) {
  return static_cast<const uint16_t*>(x.data) + b * x.batch + row * x.row + head * x.head;
}

// kRows rows of `size` 16-bit numbers into a shared tile of rows of D: `rows` of them exist, the
// rest of the tile becomes zero. Asynchronous.
template <int kRows, int D, int kThreads>
__device__ __forceinline__ void load_tile(uint32_t tile, const uint16_t* from, int64_t stride,
                                          int rows, int size) {
  constexpr int kChunks = D / 8, kSteps = kRows * kChunks / kThreads;
  static_assert(kRows * kChunks % kThreads == 0 && kThreads % kChunks == 0);
  const int first = static_cast<int>(threadIdx.x);
  const int chunk = first % kChunks;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = first / kChunks + i * (kThreads / kChunks);
    const bool present = row < rows && chunk * 8 < size;
    copy_async16(tile_address<D>(tile, row, chunk),
                 present ? from + row * stride + chunk * 8 : from, present);
  }
}

// Lets a kernel ask for more than 48 KiB of shared memory. Asked before every launch: the answer
// belongs to a device, and costs less than a microsecond.
template <class Kernel> void allow_shared(Kernel kernel, int bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace omq::cuda
