// Numbers: 16-bit float types, type dispatch, rounding, and the fast exp of the CPU.
//
// bf16 and f16 are storage types: they convert to float, arithmetic happens there. Conversions
// round half to even, as does every rounding in the library (rint, never std::round).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "tensor/error.h"
#include "tensor/tensor.h"

#ifdef __CUDACC__
#define OMQ_HD __host__ __device__
#else
#define OMQ_HD
#endif

namespace omq {

inline float f16_bits_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exp = (h >> 10) & 31u, man = h & 1023u;
  if (exp == 31) return std::bit_cast<float>(sign | 0x7f800000u | (man << 13));
  if (exp == 0) {  // zero and subnormals: man · 2⁻²⁴, exact in f32
    const float v = static_cast<float>(man) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(v) | sign);
  }
  return std::bit_cast<float>(sign | ((exp + 112u) << 23) | (man << 13));
}

inline uint16_t f32_to_f16_bits(float f) {
  const uint32_t x = std::bit_cast<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>((x >> 16) & 0x8000u);
  const uint32_t a = x & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // ≥ 65520 → inf
  if (a < 0x38800000u) {  // subnormal in f16: let the FPU round at 2⁻²⁴
    const float m = std::bit_cast<float>(a) * 0x1p24f;
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(m)));
  }
  const uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((r - 0x38000000u) >> 13));
}

inline float bf16_bits_to_f32(uint16_t h) {
  return std::bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

inline uint16_t f32_to_bf16_bits(float f) {
  const uint32_t x = std::bit_cast<uint32_t>(f);
  if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((x >> 16) | 0x40u);  // NaN
  return static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
}

struct bf16_t {
  uint16_t bits = 0;
  bf16_t() = default;
  explicit bf16_t(float f) : bits(f32_to_bf16_bits(f)) {}
  explicit operator float() const { return bf16_bits_to_f32(bits); }
};

struct f16_t {
  uint16_t bits = 0;
  f16_t() = default;
  explicit f16_t(float f) : bits(f32_to_f16_bits(f)) {}
  explicit operator float() const { return f16_bits_to_f32(bits); }
};

// Half to even.
OMQ_HD inline float round_even(float x) { return ::nearbyintf(x); }
OMQ_HD inline double round_even(double x) { return ::nearbyint(x); }

// Calls f.template operator()<T>() with the C++ type of t.
template <class F> decltype(auto) visit_dtype(DType t, F&& f) {
  switch (t) {
    case DType::F64:
      return f.template operator()<double>();
    case DType::F32:
      return f.template operator()<float>();
    case DType::BF16:
      return f.template operator()<bf16_t>();
    case DType::F16:
      return f.template operator()<f16_t>();
    case DType::I32:
      return f.template operator()<int32_t>();
    case DType::I8:
      return f.template operator()<int8_t>();
    case DType::U8:
      return f.template operator()<uint8_t>();
  }
  fail("unknown dtype {}", static_cast<int>(t));
}

// The compute types only: F32, and F64 for gradient checks. `op` names the caller in the error.
template <class F> decltype(auto) visit_float(const char* op, DType t, F&& f) {
  if (t == DType::F64) return f.template operator()<double>();
  check(t == DType::F32, "{}: computes in F32 (or F64), got {}; convert with to()", op,
        dtype_name(t));
  return f.template operator()<float>();
}

// eˣ in F32: 2ⁿ · p(r), |relative error| < 2e-7 over the whole range; a straight-line polynomial,
// so loops over it vectorise (libm's call costs about five times as much). Inputs below −87.3 give
// 0. A GPU's own expf is as accurate and costs no more than this.
OMQ_HD inline float exp_fast(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  const float clamped = x > 88.72f ? 88.72f : x;
  const float n = std::nearbyint(clamped * 1.44269504088896341f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  // 2ⁿ in two factors, so that n = 128 does not overflow half-way
  const int half = static_cast<int>(n) >> 1, rest = static_cast<int>(n) - half;
  const float a = std::bit_cast<float>((half + 127) << 23);
  const float b = std::bit_cast<float>((rest + 127) << 23);
  return x < -87.3f ? 0.0f : y * a * b;
#endif
}
OMQ_HD inline double exp_fast(double x) { return ::exp(x); }

}  // namespace omq
