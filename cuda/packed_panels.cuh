// Which panels of 16 rows of the matrices a block works at, for the kernels for few rows of x.
#pragma once

#include "cuda/gemv.cuh"

namespace omq::cuda {

// Where the codes of a block's panel begin for a lane, and its grids.
struct PanelPlace {
  const uint8_t* codes;
  const GridWord* grids;
  __device__ __forceinline__ PanelPlace(const GemvArgs& a, RowOutput output, int panel,
                                        int unit_bytes, int lane) {
    const bool pairs = output == RowOutput::SiluMul;
    int at = panel_of_block(a, pairs ? panel / 2 : panel);
    const int i = pairs ? panel % 2 : output == RowOutput::Store ? find_matrix(a, at) : 0;
    codes = static_cast<const uint8_t*>(a.m[i].data) +
            (static_cast<int64_t>(at) * (a.units * unit_bytes) + lane * 16);
    grids = a.m[i].grids + static_cast<int64_t>(at) * (a.groups * 16);
  }
};

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
    int at = panel_of_block(a, pairs ? panel / 2 : panel);
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

// Fills in what a product needs to know of packed matrices, all of one layout, which is returned.
// a.output is set before.
PackedView packed_arguments(GemvArgs& a, std::span<const RowMatrix> matrices);

}  // namespace omq::cuda
