// The words of the AVX2 kernels: panels to vectors (internal to tensor/). See packed_avx2.cpp.
#pragma once

#include <immintrin.h>

#include "tensor/cpu/packed_panels.h"

namespace omq::cpu {

// Defined in packed_avx2_codes.cpp and packed_avx2_dense.cpp, for the table in packed_avx2.cpp.
namespace avx2 {
void gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte* scratch);
int64_t gemm_codes_scratch_bytes(const PanelView& w);
void dense_gemv(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                int64_t row1);
void widen(const void* values, Stored type, float* out, int64_t n);
}  // namespace avx2

namespace {

OMQ_INLINE __m256i load(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

// ---- unpacking: quad s of a half vector ----

struct Pairs {
  __m256i even, odd;  // columns 0 and 2, columns 1 and 3 of a quad
};

// Bits 4r + j of a word (8 rows) to the value 4 in byte 4r + j.
OMQ_INLINE __m256i third_bits(const uint8_t* word) {
  int32_t bits;
  __builtin_memcpy(&bits, word, 4);
  const __m256i source = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                          2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), source);
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit),
                          _mm256_set1_epi8(4));
}

// 8 rows × 4 columns, a byte a code.
template <int Bits> OMQ_INLINE __m256i unpack_bytes(__m256i v, const uint8_t* high, int s) {
  if constexpr (Bits == 8) return v;
  constexpr int kPlane = Bits == 3 ? 2 : Bits;
  const __m256i low =
      _mm256_and_si256(_mm256_srli_epi16(v, kPlane * s), _mm256_set1_epi8((1 << kPlane) - 1));
  if constexpr (Bits == 3) return _mm256_or_si256(low, third_bits(high + 8 * s));
  return low;
}

// The same as 16-bit lanes.
template <int Bits> OMQ_INLINE Pairs unpack(__m256i v, const uint8_t* high, int s) {
  if constexpr (Bits == 3) {
    const __m256i code = unpack_bytes<Bits>(v, high, s);
    return {_mm256_and_si256(code, _mm256_set1_epi16(255)), _mm256_srli_epi16(code, 8)};
  } else {
    const __m256i mask = _mm256_set1_epi16((1 << Bits) - 1);
    return {_mm256_and_si256(_mm256_srli_epi16(v, Bits * s), mask),
            _mm256_and_si256(_mm256_srli_epi16(v, 8 + Bits * s), mask)};
  }
}

// 8 of the 16 values of a grid line.
OMQ_INLINE __m256 load_f16(const uint8_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
OMQ_INLINE __m256 zeros_at(const PanelView& w, const uint8_t* grid, int half) {
  return w.symmetric ? _mm256_set1_ps(static_cast<float>(1 << (w.bits - 1)))
                     : load_f16(grid + 2 * kRows + 16 * half);
}

// The first `live` of 8 values.
OMQ_INLINE void store_rows(float* y, __m256 v, int64_t live) {
  if (live >= 8) return _mm256_storeu_ps(y, v);
  float buffer[8];
  _mm256_storeu_ps(buffer, v);
  for (int64_t r = 0; r < live; ++r) y[r] = buffer[r];
}

}  // namespace

}  // namespace omq::cpu
