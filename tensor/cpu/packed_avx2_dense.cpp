// Dense weights, a few rows of x: the bandwidth-bound product and the widening to float, for AVX2.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_avx2.h"

namespace omq::cpu {

namespace {

template <Stored T> OMQ_INLINE __m256 load_wide(const uint8_t* at) {
  if constexpr (T == Stored::F32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  } else if constexpr (T == Stored::F16) {
    return load_f16(at);
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

// The last n < 8 values, zeros behind them.
template <Stored T> OMQ_INLINE __m256 load_tail(const uint8_t* at, int64_t n) {
  uint8_t buffer[32] = {};
  __builtin_memcpy(buffer, at, static_cast<size_t>(n * kStoredBytes<T>));
  return load_wide<T>(buffer);
}

OMQ_INLINE float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <Stored T, int R, int M>
OMQ_INLINE void dense_rows(const DenseView& w, const float* x, float* y, int64_t row) {
  constexpr int64_t kBytes = kStoredBytes<T>;
  const uint8_t* base = static_cast<const uint8_t*>(w.data) + row * w.cols * kBytes;
  __m256 sum[R][M];
  OMQ_UNROLL for (int r = 0; r < R; ++r) OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] =
      _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= w.cols; k += 8) OMQ_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* at = base + (r * w.cols + k) * kBytes;
      _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
      const __m256 ws = load_wide<T>(at);
      OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] =
          _mm256_fmadd_ps(ws, _mm256_loadu_ps(x + m * w.cols + k), sum[r][m]);
    }
  if (k < w.cols) OMQ_UNROLL for (int r = 0; r < R; ++r) {
      const __m256 ws = load_tail<T>(base + (r * w.cols + k) * kBytes, w.cols - k);
      OMQ_UNROLL for (int m = 0; m < M; ++m) {
        const uint8_t* xs = reinterpret_cast<const uint8_t*>(x + m * w.cols + k);
        sum[r][m] = _mm256_fmadd_ps(ws, load_tail<Stored::F32>(xs, w.cols - k), sum[r][m]);
      }
    }
  OMQ_UNROLL for (int r = 0; r < R; ++r) OMQ_UNROLL for (int m = 0; m < M; ++m)
      y[m * w.rows + row + r] = sum_of(sum[r][m]);
}

template <Stored T> void widen_type(const void* values, float* out, int64_t n) {
  constexpr int64_t kBytes = kStoredBytes<T>;
  const uint8_t* at = static_cast<const uint8_t*>(values);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_wide<T>(at + i * kBytes));
  if (i < n) store_rows(out + i, load_tail<T>(at + i * kBytes, n - i), n - i);
}

}  // namespace

void avx2::dense_gemv(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                      int64_t row1) {
  with_stored(w.type, [&]<Stored T>() {
    multiply_dense<4, 2>(w, x, m, y, row0, row1,
                         [&]<int R, int M>(const float* xs, float* ys, int64_t row) {
                           dense_rows<T, R, M>(w, xs, ys, row);
                         });
  });
}

void avx2::widen(const void* values, Stored type, float* out, int64_t n) {
  with_stored(type, [&]<Stored T>() { widen_type<T>(values, out, n); });
}

}  // namespace omq::cpu
