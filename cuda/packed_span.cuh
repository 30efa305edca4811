// What a warp of packed_row.cu does at a time: four neighbouring units of a panel against one row
// of x.
#pragma once

#include "cuda/packed_unit.cuh"
#include "cuda/prepared_row.cuh"

namespace omq::cuda {

constexpr int kSpan = 4;  // units
constexpr int unit_bytes(int bits, int unit) { return unit_words(bits, unit) * 128; }
constexpr int span_bytes(int bits, int unit) { return kSpan * (unit_bytes(bits, unit) + 64); }
// Of a prepared row.
constexpr int span_row_bytes(int unit) { return PreparedRow::bytes(kSpan * unit); }
constexpr int span_slot_bytes(bool prepared, int bits, int unit) {
  return span_bytes(bits, unit) + (prepared ? span_row_bytes(unit) : 0);
}

// A slot holds codes, grids, then the columns of x. Copies into it are made by a warp, all of it,
// asynchronously. slot, codes: where they begin, and 16 bytes a lane further; grid: 16 bytes of
// unit lane / 4's, for lanes below kGridLanes; row: where the span's columns begin, and 16 bytes
// further for each lane behind kGridLanes, so below that in front of them.
template <int kBits, int kUnit> struct SpanCopy {
  static constexpr int kUnitBytes = unit_bytes(kBits, kUnit), kGridLanes = 4 * kSpan,
                       kGridsAt = kSpan * kUnitBytes, kRowAt = span_bytes(kBits, kUnit);
  static_assert(kGridsAt % 512 == 0 && kRowAt == kGridsAt + kGridLanes * 16);
  // A row's first pieces, where they are copied with the grids, by lanes behind theirs.
  static constexpr int kRowPieces = span_row_bytes(kUnit) / 16, kOver = kRowPieces % 32,
                       kWithGrids = kOver <= 32 - kGridLanes ? kOver : 0;

  // units: that stand in the panel from there on, at least one.
  static __device__ __forceinline__ void codes(uint32_t slot, const uint8_t* codes, int units,
                                               int lane, uint64_t policy) {
    const int left = units * kUnitBytes - lane * 16;
#pragma unroll
    for (int i = 0; i < kGridsAt; i += 512)
      if (kUnitBytes % 512 != 0 ? i < left : i < kUnitBytes || i / kUnitBytes < units)
        copy_async_once<16>(slot + i, codes + i, policy);
  }
  static __device__ __forceinline__ void grids(uint32_t slot, const GridWord* grid, int lane,
                                               uint64_t policy) {
    if (lane < kGridLanes) copy_async_once<16>(slot + kGridsAt, grid, policy);
  }
  static __device__ __forceinline__ void row(uint32_t slot, const char* row, int lane) {
    pieces(slot + kRowAt, row, 0, lane);
  }
  static __device__ __forceinline__ void grids_and_row(uint32_t slot, const GridWord* grid,
                                                       const char* row, int lane, uint64_t policy) {
    const char* from = lane < kGridLanes ? reinterpret_cast<const char*>(grid) : row;
    // The few pieces of x may leave the L2 cache early: all blocks read them within a microsecond.
    if (lane < kGridLanes + kWithGrids) copy_async_once<16>(slot + kGridsAt, from, policy);
    pieces(slot + kRowAt, row, kWithGrids, lane);
  }

 private:
  static __device__ __forceinline__ void pieces(uint32_t to, const char* row, int first, int lane) {
#pragma unroll
    for (int i = first; i < kRowPieces; i += 32)
      if (i + 32 <= kRowPieces || lane < kRowPieces - i)
        copy_async16(to + i * 16, row + (kGridLanes + i) * 16, true);
  }
};

// A span's columns of x as the products' other operand. A lane holds those of unit lane / 8: its
// registers of the other units are zero from the beginning, and never loaded. Loads of eight lanes
// are short, and what a processor's shared memory can give is the limit here (below).
template <int kUnit> class SpanOfRow {
 public:
  uint32_t b[kSpan][kUnit / 16] = {};

  __device__ __forceinline__ explicit SpanOfRow(int lane) : unit_(lane / 8) {
    const int first = kUnit == 32 ? unit_ / 2 * PreparedRow::kRecord + unit_ % 2 * 8
                                  : unit_ * PreparedRow::bytes(kUnit);
    inside_ = static_cast<uint32_t>(first + lane / 4 % 2 * PreparedRow::kLoAfter + lane % 4 * 16);
  }
  // columns: where the span's begin in shared memory. From the last unit: in this order nvcc 13.0
  // keeps b where it stands, in the other it moves eight registers a span.
  __device__ __forceinline__ void load(uint32_t columns) {
    const uint32_t at = columns + inside_;
#pragma unroll
    for (int u = kSpan - 1; u >= 0; --u)
      if constexpr (kUnit == 32)
        load_shared_where(b[u], at, unit_ == u);
      else
#pragma unroll
        for (int i = 0; i < kUnit / 16; i += 4)
          load_shared_where(b[u][i], b[u][i + 1], b[u][i + 2], b[u][i + 3],
                            at + i / 4 * PreparedRow::kRecord, unit_ == u);
  }

 private:
  int unit_;
  uint32_t inside_;  // a lane's place in a span
};

// Four units against x, row: their columns. The lane's sums are those of unit lane % 4, rows lane /
// 4 and lane / 4 + 8.
//
// What a processor's shared memory moves for a span at 2 bits, in passes of 128 bytes: codes 16 in
// and 16 out, x 9 in and 8 out, scales 10. With zeros loaded for the lanes of the other units x
// took 32 instead of 8, and 16 warps 1 180 passes in the 1 230 cycles of a span.
template <int kBits, int kUnit>
__device__ __forceinline__ float2 multiply_span(const char* slot, SpanOfRow<kUnit>& x,
                                                const char* row, int lane) {
  constexpr int kProducts = kUnit / kScaleColumns;
  const auto bit = [](int half, int product) { return place_bit(kBits, kUnit, half, product); };
  int32_t sums[kProducts][4] = {};
  x.load(shared_address(row));
#pragma unroll
  for (int u = 0; u < kSpan; ++u) {
    uint32_t w[unit_words(kBits, kUnit)];
    load_words<kBits, kUnit>(w, slot + u * unit_bytes(kBits, kUnit), lane);
#pragma unroll
    for (int s = 0; s < kProducts; ++s) {
      const auto codes = [&](int half, int f) {
        return four_codes<kBits, kUnit>(w, half, f, bit(half, s));
      };
      const uint32_t a[4] = {codes(0, 2 * s), codes(1, 2 * s), codes(0, 2 * s + 1),
                             codes(1, 2 * s + 1)};
      multiply_bytes(sums[s], a, x.b[u][2 * s], x.b[u][2 * s + 1]);
    }
  }
  // Σ code · x of 32 columns in whole numbers of x.
  constexpr int64_t kMost = int64_t{kScaleColumns} * ((1 << kBits) - 1) * (127 * 256 + 127);
  static_assert(kMost << kHighestPlace < int64_t{1} << 31);
  // The first of the lane's unit.
  const char* scales =
      row + PreparedRow::kScalesAt +
      (kUnit == 32 ? lane % 4 / 2 * PreparedRow::kRecord + lane % 2 * int{sizeof(RowScale)}
                   : lane % 4 * PreparedRow::bytes(kUnit));
  float dot[2] = {}, minus_sum = 0;
#pragma unroll
  for (int s = 0; s < kProducts; ++s) {
    const RowScale scale =
        reinterpret_cast<const RowScale*>(scales + s / 2 * PreparedRow::kRecord)[s % 2];
    minus_sum = s == 0 ? scale.minus_sum : minus_sum + scale.minus_sum;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Codes at bit b of their bytes gave 2ᵇ times the sum.
      const float by = scale.scale * (1.0f / static_cast<float>(1 << bit(half, s)));
      dot[half] += static_cast<float>(sums[s][2 * half] * 256 + sums[s][2 * half + 1]) * by;
    }
  }
  const auto* grid = reinterpret_cast<const GridWord*>(slot + kSpan * unit_bytes(kBits, kUnit)) +
                     lane % 4 * 16 + lane / 4;
  const GridWord upper = grid[0], lower = grid[8];
  const auto scaled = [&](float sum, GridWord g) {
    return fmaf(static_cast<float>(grid_zero(g)), minus_sum, sum) * grid_scale(g);
  };
  return {scaled(dot[0], upper), scaled(dot[1], lower)};
}

}  // namespace omq::cuda
