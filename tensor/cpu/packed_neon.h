// The words of the NEON kernels: panels to registers (internal to tensor/). See packed_neon.cpp.
#pragma once

#include <arm_neon.h>

#include "tensor/cpu/packed_panels.h"

namespace omq::cpu {

// Defined in packed_neon_codes.cpp and packed_neon_dense.cpp, for the table in packed_neon.cpp.
namespace neon {
void gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte* scratch);
int64_t gemm_codes_scratch_bytes(const PanelView& w);
void dense_gemv(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                int64_t row1);
void widen(const void* values, Stored type, float* out, int64_t n);
}  // namespace neon

namespace {

// A vector of 64 bytes is four registers. Each holds a quarter of the panel, 4 rows × 4 columns of
// a quad once unpacked: the operand order of vdotq_s32.
constexpr int kQuarters = 4;

// vdotq_s32 multiplies signed bytes by signed bytes, so registers hold code − offset and zero
// points are lessened alike: code − zero stays what it is. 8 bits need 128, narrower codes are
// positive as signed bytes too.
OMQ_INLINE int32_t offset_of(int bits) { return bits == 8 ? 128 : 0; }

// body.operator()<0>() … <N − 1>(): lanes and shifts must be constants.
template <int N, class Body> OMQ_INLINE void each(const Body& body) {
  body.template operator()<0>();
  if constexpr (N > 1) body.template operator()<1>();
  if constexpr (N > 2) body.template operator()<2>();
  if constexpr (N > 3) body.template operator()<3>();
  if constexpr (N > 4) {
    static_assert(N == 8);
    body.template operator()<4>();
    body.template operator()<5>();
    body.template operator()<6>();
    body.template operator()<7>();
  }
}

// ---- unpacking ----

// A quarter of a step: 16 bytes of each of its vectors.
template <int Bits> struct QuarterStep {
  uint8x16_t v[kVectors<Bits>];

  OMQ_INLINE QuarterStep(const uint8_t* step, int quarter) {
    OMQ_UNROLL for (int i = 0; i < kVectors<Bits>; ++i) v[i] =
        vld1q_u8(step + 64 * i + 16 * quarter);
  }
  // Quad S, code − offset.
  template <int S> OMQ_INLINE int8x16_t codes() const {
    if constexpr (Bits == 8) {
      return vreinterpretq_s8_u8(veorq_u8(v[0], vdupq_n_u8(128)));
    } else if constexpr (Bits == 3 && S >= 6) {
      return vreinterpretq_s8_u8(
          vorrq_u8(vshrq_n_u8(v[S - 6], 6), vandq_u8(vshrq_n_u8(v[2], S - 2), vdupq_n_u8(4))));
    } else {
      constexpr int kShift = Bits == 3 ? S % 2 * 3 : Bits * S;
      uint8x16_t low = v[Bits == 3 ? S / 2 : 0];
      if constexpr (kShift > 0) low = vshrq_n_u8(low, kShift);
      if constexpr (kShift + Bits < 8) low = vandq_u8(low, vdupq_n_u8((1 << Bits) - 1));
      return vreinterpretq_s8_u8(low);
    }
  }
};

// 4 · N bytes of x, the others anything.
template <int N> OMQ_INLINE int8x16_t load_quads(const int8_t* x) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 4) return vld1q_s8(x);
  if constexpr (N == 2) return vcombine_s8(vld1_s8(x), vdup_n_s8(0));
  int32_t four_columns;
  __builtin_memcpy(&four_columns, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four_columns));
}

// 4 of the 16 values of a grid line.
OMQ_INLINE float32x4_t load_f16(const uint8_t* at) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
}
OMQ_INLINE float32x4_t scales_at(const uint8_t* grid, int quarter) {
  return load_f16(grid + 8 * quarter);
}
// zero − offset
OMQ_INLINE int32x4_t zeros_at(const PanelView& w, const uint8_t* grid, int quarter) {
  const int32x4_t offset = vdupq_n_s32(offset_of(w.bits));
  if (w.symmetric) return vsubq_s32(vdupq_n_s32(1 << (w.bits - 1)), offset);
  uint32_t four;
  __builtin_memcpy(&four, grid + 2 * kRows + 4 * quarter, 4);
  const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
  return vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))), offset);
}

// The first `live` of 4 values.
OMQ_INLINE void store_rows(float* y, float32x4_t v, int64_t live) {
  if (live >= 4) return vst1q_f32(y, v);
  float buffer[4];
  vst1q_f32(buffer, v);
  for (int64_t r = 0; r < live; ++r) y[r] = buffer[r];
}

}  // namespace

}  // namespace omq::cpu
