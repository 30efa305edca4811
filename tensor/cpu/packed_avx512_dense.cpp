// Dense weights, a few rows of x: the bandwidth-bound product and the widening to float, for
// AVX-512.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_avx512.h"

namespace omq::cpu {

namespace {

template <Stored T> OMQ_INLINE __m512 load_wide(const uint8_t* at, __mmask16 live) {
  if constexpr (T == Stored::F32) {
    return _mm512_maskz_loadu_ps(live, at);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(live, at);
    if constexpr (T == Stored::F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

template <Stored T, int R, int M>
OMQ_INLINE void dense_rows(const DenseView& w, const float* x, float* y, int64_t row) {
  constexpr int64_t kBytes = kStoredBytes<T>;
  const uint8_t* base = static_cast<const uint8_t*>(w.data) + row * w.cols * kBytes;
  __m512 sum[R][M];
  OMQ_UNROLL for (int r = 0; r < R; ++r) OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] =
      _mm512_setzero_ps();
  for (int64_t k = 0; k < w.cols; k += 16) {
    const __mmask16 live = first(w.cols - k);
    __m512 xs[M];
    OMQ_UNROLL for (int m = 0; m < M; ++m) xs[m] = _mm512_maskz_loadu_ps(live, x + m * w.cols + k);
    OMQ_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* at = base + (r * w.cols + k) * kBytes;
      prefetch(at);
      const __m512 ws = load_wide<T>(at, live);
      OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] = _mm512_fmadd_ps(ws, xs[m], sum[r][m]);
    }
  }
  OMQ_UNROLL for (int r = 0; r < R; ++r) OMQ_UNROLL for (int m = 0; m < M; ++m)
      y[m * w.rows + row + r] = _mm512_reduce_add_ps(sum[r][m]);
}

template <Stored T> void widen_type(const void* values, float* out, int64_t n) {
  const uint8_t* at = static_cast<const uint8_t*>(values);
  for (int64_t i = 0; i < n; i += 16)
    _mm512_mask_storeu_ps(out + i, first(n - i),
                          load_wide<T>(at + i * kStoredBytes<T>, first(n - i)));
}

}  // namespace

void avx512::dense_gemv(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                        int64_t row1) {
  with_stored(w.type, [&]<Stored T>() {
    multiply_dense<4, 4>(w, x, m, y, row0, row1,
                         [&]<int R, int M>(const float* xs, float* ys, int64_t row) {
                           dense_rows<T, R, M>(w, xs, ys, row);
                         });
  });
}

void avx512::widen(const void* values, Stored type, float* out, int64_t n) {
  with_stored(type, [&]<Stored T>() { widen_type<T>(values, out, n); });
}

}  // namespace omq::cpu
