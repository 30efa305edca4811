// The words of the AVX-512 kernels: panels to vectors (internal to tensor/). See packed_avx512.cpp.
#pragma once

#include <immintrin.h>

#include "tensor/cpu/packed_panels.h"

namespace omq::cpu {

// The entries of the table in packed_avx512.cpp; packed_amx.cpp has most of them too. Defined in
// packed_avx512.cpp, packed_avx512_codes.cpp and packed_avx512_dense.cpp.
namespace avx512 {
bool runs_here();
void prepare(const PanelView& w, const float* x, std::byte* out);
void gemv(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1);
void dequantize(const PanelView& w, int64_t panel, float* out, int64_t ld);
void gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte* scratch);
int64_t gemm_codes_scratch_bytes(const PanelView& w);
void dense_gemv(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                int64_t row1);
void widen(const void* values, Stored type, float* out, int64_t n);
}  // namespace avx512

namespace {

OMQ_INLINE void prefetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
}

OMQ_INLINE __mmask16 first(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}

// ---- unpacking: a step into quads of bytes ----

// Narrow codes cost more to unpack than to multiply. With Scaled the odd quads stay a code's bits
// up, which saves half of the shifts; their sums are kept apart and shifted back once a chunk.
template <int Bits, bool Scaled> OMQ_INLINE void unpack(const uint8_t* step, __m512i* quad) {
  const __m512i v = _mm512_loadu_si512(step);
  const auto mask = [](int bits) { return _mm512_set1_epi8(static_cast<char>(bits)); };
  if constexpr (Bits == 8) {
    quad[0] = v;
  } else if constexpr (Bits == 4) {
    quad[0] = _mm512_and_si512(v, mask(15));
    quad[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask(15));
  } else if constexpr (Bits == 2) {
    const __m512i even = mask(3), odd = mask(Scaled ? 12 : 3);
    const __m512i v4 = _mm512_srli_epi16(v, 4);
    quad[0] = _mm512_and_si512(v, even);
    quad[1] = _mm512_and_si512(Scaled ? v : _mm512_srli_epi16(v, 2), odd);
    quad[2] = _mm512_and_si512(v4, even);
    quad[3] = _mm512_and_si512(Scaled ? v4 : _mm512_srli_epi16(v, 6), odd);
  } else {
    const __m512i vectors[3] = {v, _mm512_loadu_si512(step + 64), _mm512_loadu_si512(step + 128)};
    OMQ_UNROLL for (int i = 0; i < 3; ++i) {
      quad[2 * i] = _mm512_and_si512(vectors[i], mask(7));
      quad[2 * i + 1] = Scaled ? _mm512_and_si512(vectors[i], mask(7 << 3))
                               : _mm512_and_si512(_mm512_srli_epi16(vectors[i], 3), mask(7));
    }
    OMQ_UNROLL for (int s = 6; s < 8; ++s) {
      const int up = Scaled && s == 7 ? 3 : 0;
      const __m512i top =
          _mm512_and_si512(_mm512_srli_epi16(vectors[2], s - 2 - up), mask(4 << up));
      // low & mask | top
      quad[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi16(vectors[s - 6], 6 - up), mask(3 << up),
                                          top, 0xea);
    }
  }
}

OMQ_INLINE __m512 load_f16(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
OMQ_INLINE __m512i zeros_at(const PanelView& w, const uint8_t* grid) {
  return w.symmetric ? _mm512_set1_epi32(1 << (w.bits - 1))
                     : _mm512_cvtepu8_epi32(
                           _mm_loadu_si128(reinterpret_cast<const __m128i*>(grid + 2 * kRows)));
}
OMQ_INLINE __m512i broadcast(const int8_t* x) {
  int32_t four_columns;
  __builtin_memcpy(&four_columns, x, 4);
  return _mm512_set1_epi32(four_columns);
}

// ---- prepared activations ----

// One chunk of n columns of x as whole numbers of 15 bits, put(i, high plane, low plane) for
// columns i … i + 15 up to `slot`. A value that is not finite makes the scale NaN, so that it shows
// in every output that it touches.
template <class Put>
OMQ_INLINE void prepare_chunk(const float* x, int64_t n, int64_t slot, float* scale, int32_t* sum,
                              const Put& put) {
  __m512 top = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 a = _mm512_abs_ps(_mm512_maskz_loadu_ps(first(n - i), x + i));
    bad = static_cast<__mmask16>(bad |
                                 _mm512_cmp_ps_mask(a, _mm512_set1_ps(__FLT_MAX__), _CMP_NLE_UQ));
    top = _mm512_max_ps(top, a);
  }
  const float peak = _mm512_reduce_max_ps(top);
  const bool flat = bad != 0 || peak < 1e-30f;  // below: 1 / scale would overflow
  *scale = bad ? __builtin_nanf("") : flat ? 0.0f : peak / kActMax;
  const __m512 inverse = _mm512_set1_ps(flat ? 0.0f : kActMax / peak);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < slot; i += 16) {
    const __mmask16 live = flat || i >= n ? 0 : first(n - i);
    const __m512 a = _mm512_maskz_loadu_ps(live, x + (i < n ? i : 0));
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
    const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
    put(i, _mm512_cvtepi32_epi8(h), _mm512_cvtepi32_epi8(v));
    total = _mm512_add_epi32(total, v);
  }
  *sum = _mm512_reduce_add_epi32(total);
}

}  // namespace

}  // namespace omq::cpu
