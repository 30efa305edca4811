// One unit of packed weights on its way: from memory into a slot of shared memory, and from there
// against a row of x that became whole numbers of two bytes. packed_gemv.cu walks the units; the
// layout is drawn in packed_layout.cuh.
#pragma once

#include "cuda/gemv.cuh"

namespace omq::cuda {

constexpr int slot_bytes(int bits, int unit) { return unit_words(bits, unit) * 128 + 64; }

// Copies a unit's codes and its group's grid into a slot, by one warp, asynchronously.
template <int kBits, int kUnit>
__device__ __forceinline__ void copy_unit(const uint8_t* codes, const __half2* grid, uint32_t slot,
                                          int lane) {
  constexpr int kWords = unit_words(kBits, kUnit), kFours = kWords / 4 * 4;
#pragma unroll
  for (int i = 0; i < kFours; i += 4)
    copy_async16(slot + i * 128 + lane * 16, codes + i * 128 + lane * 16, true);
  if constexpr (kWords % 4 >= 2)
    copy_async8(slot + kFours * 128 + lane * 8, codes + kFours * 128 + lane * 8);
  if constexpr (kWords % 2 == 1)
    copy_async4(slot + (kWords - 1) * 128 + lane * 4, codes + (kWords - 1) * 128 + lane * 4, true);
  if (lane < 4) copy_async16(slot + kWords * 128 + lane * 16, grid + lane * 4, true);
}

// Rows of x in shared memory: bytes, and what each unit's whole numbers stand for.
struct StagedX {
  char* bytes;   // [rows, bytes of a row]
  float* scale;  // [rows, units]
  int* sum;      // [rows, units], of the whole numbers
};

// Columns c … c + 3 of a row whose bytes, scales and sums begin at x. A unit's lanes call together.
// whole: the values are whole numbers of less than two bytes already.
template <int kUnit>
__device__ __forceinline__ void put_bytes(const StagedX& x, int units, int c, float4 v,
                                          bool whole) {
  constexpr int kTeam = kUnit / 4;  // lanes that hold a unit
  constexpr float kTop = 127 * 256 + 127;
  float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  const bool broken = v.x != v.x || v.y != v.y || v.z != v.z || v.w != v.w;
  if (broken) largest = INFINITY;
  largest = team_max<kTeam>(largest);
  const float up = whole ? 1.0f : largest > 0 ? kTop / largest : 0.0f;
  const auto number = [&](float f) { return __float2int_rn(f * up); };
  const int i[4] = {number(v.x), number(v.y), number(v.z), number(v.w)};
  uint32_t hi = 0, lo = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int h = (i[j] + 128) >> 8;
    hi |= (static_cast<uint32_t>(h) & 255) << (8 * j);
    lo |= (static_cast<uint32_t>(i[j] - h * 256) & 255) << (8 * j);
  }
  const int sum = team_sum<kTeam>(i[0] + i[1] + i[2] + i[3]);
  const int unit = c / kUnit;
  if (unit >= units) return;
  char* at = x.bytes + unit * (2 * kUnit) + PlanePlace<kUnit>::hi(c % kUnit);
  *reinterpret_cast<uint32_t*>(at) = hi;
  *reinterpret_cast<uint32_t*>(at + PlanePlace<kUnit>::lo_after) = lo;
  if (c % kUnit != 0) return;
  // Infinite or not a number: so is the result.
  x.scale[unit] = isinf(largest) ? __int_as_float(0x7fc00000) : whole ? 1.0f : largest / kTop;
  x.sum[unit] = sum;
}

// total: of rows r and r + 8 and row q of x. x: the lane's bytes of the unit; scale, sum: of it.
template <int kBits, int kUnit>
__device__ __forceinline__ void multiply_unit(float (&total)[2], const char* slot, const char* x,
                                              float x_scale, int x_sum, int lane) {
  constexpr int kWords = unit_words(kBits, kUnit), kFours = kWords / 4 * 4;
  uint32_t w[kWords];
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
  const __half2* grid = reinterpret_cast<const __half2*>(slot + kWords * 128);
  const float2 upper = __half22float2(grid[lane / 4]), lower = __half22float2(grid[lane / 4 + 8]);
  int32_t sums[4] = {};
#pragma unroll
  for (int s = 0; s < kUnit / 32; ++s) {
    const uint32_t a[4] = {
        four_codes<kBits, kUnit>(w, 0, 2 * s), four_codes<kBits, kUnit>(w, 1, 2 * s),
        four_codes<kBits, kUnit>(w, 0, 2 * s + 1), four_codes<kBits, kUnit>(w, 1, 2 * s + 1)};
    const uint2 b = *reinterpret_cast<const uint2*>(x + s / 2 * 128 + s % 2 * 8);
    multiply_bytes(sums, a, b.x, b.y);
  }
  const auto dot = [&](int hi, int lo, float zero) {
    return static_cast<float>(hi * 256 + lo - static_cast<int>(zero) * x_sum) * x_scale;
  };
  total[0] += upper.x * dot(sums[0], sums[1], upper.y);
  total[1] += lower.x * dot(sums[2], sums[3], lower.y);
}

}  // namespace omq::cuda
