// Values as whole numbers of two bytes: what packed weights are multiplied by.
#pragma once

#include "cuda/ptx.cuh"

namespace omq::cuda {

// How values become whole numbers of two bytes, i = 256 · hi + lo, both signed: lo is the last byte
// of i, hi the one above it of i + 128.
struct WholeScale {
  static constexpr float kTop = 127 * 256 + 127;
  // Added to 1.5 · 2²³ a number rounds to a whole one, which is then in the low bits.
  static constexpr float kRound = 12582912;
  static constexpr uint32_t kRoundBits = 0x4b400000;
  float by, scale;  // value · by = i; i · scale = value

  // top: bits of the largest magnitude, which comes to be kTop. Their order is that of the values;
  // NaN is above, and where a value is infinite or not a number, so is the result.
  __device__ __forceinline__ explicit WholeScale(uint32_t top) {
    const bool usable = top - 0x00800000u < 0x7f000000u;  // neither denormal nor infinite
    by = usable ? kTop * reciprocal_fast(__uint_as_float(top)) : 0.0f;
    scale = top >= 0x7f800000u ? __int_as_float(0x7fc00000) : __uint_as_float(top) * (1 / kTop);
  }
  __device__ __forceinline__ uint32_t bits(float v, float round) const {
    return __float_as_uint(fmaf(v, by, round));
  }
};

}  // namespace omq::cuda
