// What the AVX2 kernels share: unpacking, the walk of gemv, prepared chunks (internal to tensor/).
// See packed_avx2.cpp.
#pragma once

#include <immintrin.h>

#include "tensor/cpu/packed_panels.h"

namespace omq::cpu {

// Defined in packed_avx2_pairs.cpp, packed_avx2_codes.cpp and packed_avx2_dense.cpp, for the table
// in packed_avx2.cpp.
namespace avx2 {
void prepare_pairs(const PanelView& w, const float* x, std::byte* out);
void prepare_codes_pairs(const PanelView& w, const RowCodes& x, std::byte* out);
void gemv_pairs(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1);
int64_t gemm_block_bytes(const PanelView& w);
void prepare_gemm_block(const PanelView& w, const float* x, int64_t rows, std::byte* out);
void gemm(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1, std::byte* scratch);
int64_t gemm_scratch_bytes(const PanelView& w);
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

// Has v computed here: left alone, the compiler gathers the products of all quads before it adds
// them, and spills them.
OMQ_INLINE void settle(__m256i& v) { asm("" : "+x"(v)); }

// ---- unpacking ----

struct Pairs {
  __m256i even, odd;  // columns 0 and 2, columns 1 and 3 of a quad
};

// 8 rows of a step: half of each of its vectors.
template <int Bits> struct HalfStep {
  __m256i v[kVectors<Bits>];

  OMQ_INLINE HalfStep() {}
  OMQ_INLINE HalfStep(const uint8_t* step, int half) {
    OMQ_UNROLL for (int i = 0; i < kVectors<Bits>; ++i) v[i] = load(step + 64 * i + 32 * half);
  }
  // Quad s, 8 rows × 4 columns, a byte a code.
  OMQ_INLINE __m256i bytes(int s) const {
    if constexpr (Bits == 8) return v[0];
    if constexpr (Bits == 3) {
      if (s < 6) return field(s / 2, 3 * (s % 2), 7);
      return _mm256_or_si256(field(s - 6, 6, 3), field(2, s - 2, 4));
    }
    return field(0, Bits * s, (1 << Bits) - 1);
  }
  // The same as 16-bit lanes.
  OMQ_INLINE Pairs pairs(int s) const {
    if constexpr (Bits == 3) {
      const __m256i code = bytes(s);
      return {_mm256_and_si256(code, _mm256_set1_epi16(255)), _mm256_srli_epi16(code, 8)};
    } else {
      const __m256i mask = _mm256_set1_epi16((1 << Bits) - 1);
      return {_mm256_and_si256(_mm256_srli_epi16(v[0], Bits * s), mask),
              _mm256_and_si256(_mm256_srli_epi16(v[0], 8 + Bits * s), mask)};
    }
  }

 private:
  OMQ_INLINE __m256i field(int i, int shift, int mask) const {
    return _mm256_and_si256(_mm256_srli_epi16(v[i], shift),
                            _mm256_set1_epi8(static_cast<char>(mask)));
  }
};

// 8 of the 16 values of a grid line.
OMQ_INLINE __m256 load_f16(const uint8_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
OMQ_INLINE __m256i zeros_at(const PanelView& w, const uint8_t* grid, int half) {
  return w.symmetric ? _mm256_set1_epi32(1 << (w.bits - 1))
                     : _mm256_cvtepu8_epi32(_mm_loadl_epi64(
                           reinterpret_cast<const __m128i*>(grid + 2 * kRows + 8 * half)));
}

// The first `live` of 8 values.
OMQ_INLINE void store_rows(float* y, __m256 v, int64_t live) {
  if (live >= 8) return _mm256_storeu_ps(y, v);
  float buffer[8];
  _mm256_storeu_ps(buffer, v);
  for (int64_t r = 0; r < live; ++r) y[r] = buffer[r];
}

OMQ_INLINE void prefetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
}

// A chunk's sum of code · x added to y: y + scale · x_scale · (dot − zero · Σ x).
OMQ_INLINE __m256 add_chunk(__m256 y, __m256i dot, __m256i zero, __m256 scale, int32_t x_sum,
                            float x_scale) {
  const __m256i off = _mm256_mullo_epi32(zero, _mm256_set1_epi32(x_sum));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(dot, off)),
                         _mm256_mul_ps(scale, _mm256_set1_ps(x_scale)), y);
}

// The walk of gemv over panels and rows of x: body.operator()<P, M>(x of the first row, y of it,
// first panel, stride), panels panel, panel + stride, … being P streams. Each stream takes a run of
// neighbouring panels, so that prefetching past a panel's end reaches what is read next.
template <class Body>
OMQ_INLINE void gemv_streams(const PanelView& w, int64_t row_bytes, const std::byte* x, int64_t m,
                             float* y, int64_t panel0, int64_t panel1, const Body& body) {
  const auto rows = [&]<int P, int M>() {
    const int64_t run = (panel1 - panel0) / P;
    for (int64_t i = 0; i < run; ++i) body.template operator()<P, M>(x, y, panel0 + i, run);
    for (int64_t panel = panel0 + P * run; panel < panel1; ++panel)
      body.template operator()<1, M>(x, y, panel, 0);  // stride: of no other stream
  };
  // Four rows of x are bound by instructions: one stream does. Each form is a few KB of code, so
  // three rows are two and one.
  for (; m >= 4; m -= 4, x += 4 * row_bytes, y += 4 * w.rows) rows.template operator()<1, 4>();
  for (; m >= 2; m -= 2, x += 2 * row_bytes, y += 2 * w.rows) rows.template operator()<4, 2>();
  if (m == 1) rows.template operator()<4, 1>();
}

// ---- prepared activations ----

OMQ_INLINE __m256 load_first(const float* x, int64_t n) {  // zeros past the first n of 8
  if (n >= 8) return _mm256_loadu_ps(x);
  float buffer[8] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i];
  return _mm256_loadu_ps(buffer);
}

OMQ_INLINE float largest(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
OMQ_INLINE int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// One chunk of n columns of x as whole numbers of 15 bits, put(i, 16 of them) for columns i … i +
// 15 up to `slot`, zeros past the chunk's end. A value that is not finite makes the scale NaN, so
// that it shows in every output that it touches. Rounds half to even.
template <class Put>
OMQ_INLINE void prepare_chunk(const float* x, int64_t n, int64_t slot, float* scale, int32_t* sum,
                              const Put& put) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 top = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 a = _mm256_and_ps(load_first(x + i, n - i), magnitude);
    bad = _mm256_or_ps(bad, _mm256_cmp_ps(a, _mm256_set1_ps(__FLT_MAX__), _CMP_NLE_UQ));
    top = _mm256_max_ps(top, a);
  }
  const bool finite = _mm256_movemask_ps(bad) == 0;
  const float peak = largest(top);
  const bool flat = !finite || peak < 1e-30f;  // below: 1 / scale would overflow
  *scale = !finite ? __builtin_nanf("") : flat ? 0.0f : peak / kActMax;
  const __m256 inverse = _mm256_set1_ps(flat ? 0.0f : kActMax / peak);
  const auto whole = [&](int64_t i) __attribute__((always_inline)) {
    return flat || i >= n ? _mm256_setzero_si256()
                          : _mm256_cvtps_epi32(_mm256_mul_ps(load_first(x + i, n - i), inverse));
  };
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < slot; i += 16) {
    const __m256i a = whole(i), b = whole(i + 8);
    total = _mm256_add_epi32(total, _mm256_add_epi32(a, b));
    put(i, _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
  }
  *sum = sum_of(total);
}

}  // namespace

}  // namespace omq::cpu
