// One unit of packed weights on its way: from memory into a slot of shared memory, and from there
// against a row of x that became whole numbers of two bytes. packed_gemv.cu and packed_rows.cu walk
// the units; the layout is drawn in packed_layout.cuh.
#pragma once

#include "cuda/gemv.cuh"
#include "cuda/whole_scale.cuh"

namespace omq::cuda {

// A slot holds so many neighbouring units of a panel: their codes, then their grids.
constexpr int slot_units(int bits) { return bits == 8 ? 1 : 2; }
constexpr int slot_bytes(int bits, int unit, int units) {
  return units * (unit_words(bits, unit) * 128 + 64);
}
constexpr int slot_bytes(int bits, int unit) { return slot_bytes(bits, unit, slot_units(bits)); }

// Copies a unit's codes into shared memory by one warp, asynchronously. from, to: where the unit
// begins, and 16 bytes a lane further.
template <int kBits, int kUnit>
__device__ __forceinline__ void copy_unit(const uint8_t* from, uint32_t to, int lane,
                                          uint64_t policy) {
  constexpr int kWords = unit_words(kBits, kUnit), kFours = kWords / 4 * 4,
                kOne = (kWords - 1) * 128;
#pragma unroll
  for (int i = 0; i < kFours; i += 4) copy_async_once<16>(to + i * 128, from + i * 128, policy);
  if constexpr (kWords % 4 >= 2)
    copy_async_once<8>(to + kFours * 128 - lane * 8, from + kFours * 128 - lane * 8, policy);
  if constexpr (kWords % 2 == 1)
    copy_async_once<4>(to + kOne - lane * 12, from + kOne - lane * 12, policy);
}

// This lane's words of a unit in shared memory.
template <int kBits, int kUnit>
__device__ __forceinline__ void load_words(uint32_t (&w)[unit_words(kBits, kUnit)],
                                           const char* slot, int lane) {
  constexpr int kWords = unit_words(kBits, kUnit), kFours = kWords / 4 * 4;
#pragma unroll
  for (int i = 0; i < kFours; i += 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(slot + i * 128 + lane * 16);
    w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
  }
  if constexpr (kWords % 4 >= 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(slot + kFours * 128 + lane * 8);
    w[kFours] = v.x, w[kFours + 1] = v.y;
  }
  if constexpr (kWords % 2 == 1)
    w[kWords - 1] = *reinterpret_cast<const uint32_t*>(slot + (kWords - 1) * 128 + lane * 4);
}

// A row of x in a unit, as this lane's share of the products' other operand; from: where the lane's
// bytes begin.
template <int kUnit>
__device__ __forceinline__ void load_planes(uint32_t (&b)[kUnit / 16], const char* from) {
  if constexpr (kUnit == 32) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    b[0] = v.x, b[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kUnit / 16; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + i / 4 * 128);
      b[i] = v.x, b[i + 1] = v.y, b[i + 2] = v.z, b[i + 3] = v.w;
    }
  }
}

// Rows of x in shared memory: bytes, and what each unit's whole numbers stand for.
struct alignas(8) UnitScale {
  float scale;
  int minus_sum;  // of the whole numbers
};
struct StagedX {
  char* bytes;       // [rows, bytes of a row]
  UnitScale* units;  // [rows, units]
};

// Where a lane meets x. As an operand it reads a plane of row lane / 8 of each tile, from `offset`
// on; of the results it has row lane % 4. Behind the last row stands the first: its sums go
// nowhere.
template <int kTiles> struct TileLanes {
  const char* bytes[kTiles];
  const UnitScale* units[kTiles];
  __device__ __forceinline__ TileLanes(const StagedX& x, int rows, int x_stride, int x_units,
                                       int offset, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int read = kTileRows * t + lane / 8, got = kTileRows * t + lane % 4;
      bytes[t] = x.bytes + (read < rows ? read : 0) * x_stride + offset;
      units[t] = x.units + (got < rows ? got : 0) * x_units;
    }
  }
};

// The lanes of the team of kTeam neighbours that this lane is in.
template <int kTeam> __device__ __forceinline__ uint32_t team_mask() {
  if constexpr (kTeam == 32) return 0xffffffffu;
  return ((1u << kTeam % 32) - 1) << (threadIdx.x % 32 / kTeam * kTeam);
}

// Four neighbouring columns of x as bytes, and what their unit's whole numbers stand for.
struct FourBytes {
  uint32_t hi, lo;
  UnitScale unit;
};

// kFours times such columns, side by side, since each is a chain of long waits. A unit's lanes, of
// which there are kTeam, call together. whole: the values are whole numbers of less than two bytes
// already; else they become such, in units that make the largest of a unit the largest.
template <int kTeam, int kFours>
__device__ __forceinline__ void whole_numbers(FourBytes (&out)[kFours], const float4 (&v)[kFours],
                                              bool whole = false) {
  uint32_t top[kFours];
  int sum[kFours];
#pragma unroll
  for (int f = 0; f < kFours; ++f)
    top[f] = __reduce_max_sync(
        team_mask<kTeam>(),
        __float_as_uint(larger_or_nan(larger_or_nan(fabsf(v[f].x), fabsf(v[f].y)),
                                      larger_or_nan(fabsf(v[f].z), fabsf(v[f].w)))));
#pragma unroll
  for (int f = 0; f < kFours; ++f) {
    WholeScale to(top[f]);
    if (whole) {
      to.by = 1;
      if (top[f] < 0x7f800000u) to.scale = 1;
    }
    constexpr float kRound = WholeScale::kRound;
    const uint32_t i[4] = {to.bits(v[f].x, kRound), to.bits(v[f].y, kRound),
                           to.bits(v[f].z, kRound), to.bits(v[f].w, kRound)},
                   above[4] = {to.bits(v[f].x, kRound + 128), to.bits(v[f].y, kRound + 128),
                               to.bits(v[f].z, kRound + 128), to.bits(v[f].w, kRound + 128)};
    const auto pick = [](const uint32_t(&from)[4], uint32_t which) {
      return __byte_perm(__byte_perm(from[0], from[1], which), __byte_perm(from[2], from[3], which),
                         0x5410);
    };
    out[f].lo = pick(i, 0x0040);
    out[f].hi = pick(above, 0x0051);
    sum[f] = static_cast<int>(i[0] + i[1] + (i[2] + i[3]) - 4 * WholeScale::kRoundBits);
    out[f].unit.scale = to.scale;
  }
#pragma unroll
  for (int f = 0; f < kFours; ++f)
    out[f].unit.minus_sum = -__reduce_add_sync(team_mask<kTeam>(), sum[f]);
}

// Columns c … c + 3 of a row whose bytes and units begin at x, for each c.
template <int kUnit, int kFours>
__device__ __forceinline__ void put_bytes(const StagedX& x, int units, const int (&c)[kFours],
                                          const float4 (&v)[kFours], bool whole = false) {
  FourBytes out[kFours];
  whole_numbers<kUnit / 4>(out, v, whole);
#pragma unroll
  for (int f = 0; f < kFours; ++f) {
    const int unit = static_cast<int>(static_cast<unsigned>(c[f]) / kUnit),
              inside = static_cast<int>(static_cast<unsigned>(c[f]) % kUnit);
    if (unit >= units) continue;
    char* at = x.bytes + unit * (2 * kUnit) + PlanePlace<kUnit>::hi(inside);
    *reinterpret_cast<uint32_t*>(at) = out[f].hi;
    *reinterpret_cast<uint32_t*>(at + PlanePlace<kUnit>::lo_after) = out[f].lo;
    if (inside == 0) x.units[unit] = out[f].unit;
  }
}

// A row's plane of a unit stands so far behind where the row begins, for a lane.
template <int kUnit> __device__ __forceinline__ int plane_offset(int lane) {
  return lane / 4 % 2 * PlanePlace<kUnit>::lo_after + lane % 4 * PlanePlace<kUnit>::kRun;
}

// A tile is four rows of x. total: of rows r and r + 8 and row q of each tile. x: where
// the lane's bytes of each tile's row begin; x_units likewise. The codes are unpacked once for all
// tiles.
template <int kBits, int kUnit, int kTiles>
__device__ __forceinline__ void multiply_unit(float (&total)[kTiles][2], const char* slot,
                                              const GridWord* grid, const char* const (&x)[kTiles],
                                              const UnitScale* const (&x_units)[kTiles], int unit,
                                              int lane) {
  uint32_t w[unit_words(kBits, kUnit)];
  load_words<kBits, kUnit>(w, slot, lane);
  const GridWord upper = grid[lane / 4], lower = grid[lane / 4 + 8];
  uint32_t b[kTiles][kUnit / 16];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) load_planes<kUnit>(b[t], x[t] + unit * (2 * kUnit));
  // One tile's products are two chains: a product waits for the one before the last.
  constexpr int kChains = kTiles == 1 ? 2 : 1;
  int32_t sums[kTiles][kChains][4] = {};
#pragma unroll
  for (int s = 0; s < kUnit / 32; ++s) {
    const uint32_t a[4] = {
        four_codes<kBits, kUnit>(w, 0, 2 * s), four_codes<kBits, kUnit>(w, 1, 2 * s),
        four_codes<kBits, kUnit>(w, 0, 2 * s + 1), four_codes<kBits, kUnit>(w, 1, 2 * s + 1)};
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      multiply_bytes(sums[t][s % kChains], a, b[t][2 * s], b[t][2 * s + 1]);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const UnitScale x_unit = x_units[t][unit];
    const auto dot = [&](int i, GridWord g) {
      int hi = sums[t][0][i], lo = sums[t][0][i + 1];
      if constexpr (kChains == 2) hi += sums[t][1][i], lo += sums[t][1][i + 1];
      return static_cast<float>(hi * 256 + lo + grid_zero(g) * x_unit.minus_sum) * x_unit.scale *
             grid_scale(g);
    };
    total[t][0] += dot(0, upper);
    total[t][1] += dot(2, lower);
  }
}

}  // namespace omq::cuda
