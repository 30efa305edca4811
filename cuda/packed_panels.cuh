// Which panels of 16 rows of the matrices a block works at, for the kernels for few rows of x.
#pragma once

#include "cuda/gemv.cuh"

namespace omq::cuda {

// The panels of a round, one a lane: where their codes and grids begin.
struct RoundPanels {
  const uint8_t* codes = nullptr;
  const GridWord* grids = nullptr;
  int rows_left = 0;  // of the matrix, from the panel's first on
  __device__ __forceinline__ RoundPanels(const GemvArgs& a, int p0, int p1, int64_t panel_bytes,
                                         int lane) {
    if (p0 + lane >= p1) return;
    const bool pairs = a.output == RowOutput::SiluMul;
    const int panel = p0 + lane;
    int at =
        static_cast<int>(blockIdx.x) + (pairs ? panel / 2 : panel) * static_cast<int>(gridDim.x);
    const int i = pairs ? panel % 2 : find_matrix(a, at);
    codes = static_cast<const uint8_t*>(a.m[i].data) + at * panel_bytes;
    grids = a.m[i].grids + static_cast<int64_t>(at) * a.groups * 16;
    rows_left = a.m[i].rows - at * 16;
  }
};
template <class T> __device__ __forceinline__ const T* pointer_of(const T* p, int lane) {
  return reinterpret_cast<const T*>(
      __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(p), lane));
}

__device__ __forceinline__ int group_of(const GemvArgs& a, int unit) {
  return a.group_shift >= 0 ? unit >> a.group_shift : unit / a.units_per_group;
}

}  // namespace omq::cuda
