// Dense weights, a few rows of x: the bandwidth-bound product and the widening to float, for NEON.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_neon.h"

namespace omq::cpu {

namespace {

// 8 values.
struct Wide {
  float32x4_t a, b;
};

template <Stored T> OMQ_INLINE Wide load_wide(const uint8_t* at) {
  if constexpr (T == Stored::F32) {
    const float* values = reinterpret_cast<const float*>(at);
    return {vld1q_f32(values), vld1q_f32(values + 4)};
  } else if constexpr (T == Stored::F16) {
    const float16x8_t half = vreinterpretq_f16_u8(vld1q_u8(at));
    return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
  } else {
    const uint16x8_t half = vreinterpretq_u16_u8(vld1q_u8(at));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(half, 16))};
  }
}

// The last n < 8 values, zeros behind them.
template <Stored T> OMQ_INLINE Wide load_tail(const uint8_t* at, int64_t n) {
  uint8_t buffer[32] = {};
  __builtin_memcpy(buffer, at, static_cast<size_t>(n * kStoredBytes<T>));
  return load_wide<T>(buffer);
}

OMQ_INLINE void add_product(Wide& sum, const Wide& w, const Wide& x) {
  sum.a = vfmaq_f32(sum.a, w.a, x.a);
  sum.b = vfmaq_f32(sum.b, w.b, x.b);
}

template <Stored T, int R, int M>
OMQ_INLINE void dense_rows(const DenseView& w, const float* x, float* y, int64_t row) {
  constexpr int64_t kBytes = kStoredBytes<T>;
  const uint8_t* base = static_cast<const uint8_t*>(w.data) + row * w.cols * kBytes;
  Wide sum[R][M];
  OMQ_UNROLL for (int r = 0; r < R; ++r) {
    OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
  }
  const auto x_at = [&](int m, int64_t k) __attribute__((always_inline)) {
    return reinterpret_cast<const uint8_t*>(x + m * w.cols + k);
  };
  int64_t k = 0;
  for (; k + 8 <= w.cols; k += 8) {
    OMQ_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* at = base + (r * w.cols + k) * kBytes;
      __builtin_prefetch(at + kPrefetchBytes);
      const Wide ws = load_wide<T>(at);
      OMQ_UNROLL for (int m = 0; m < M; ++m)
          add_product(sum[r][m], ws, load_wide<Stored::F32>(x_at(m, k)));
    }
  }
  if (k < w.cols) {
    OMQ_UNROLL for (int r = 0; r < R; ++r) {
      const Wide ws = load_tail<T>(base + (r * w.cols + k) * kBytes, w.cols - k);
      OMQ_UNROLL for (int m = 0; m < M; ++m)
          add_product(sum[r][m], ws, load_tail<Stored::F32>(x_at(m, k), w.cols - k));
    }
  }
  OMQ_UNROLL for (int r = 0; r < R; ++r) {
    OMQ_UNROLL for (int m = 0; m < M; ++m) y[m * w.rows + row + r] =
        vaddvq_f32(vaddq_f32(sum[r][m].a, sum[r][m].b));
  }
}

template <Stored T> void widen_type(const void* values, float* out, int64_t n) {
  constexpr int64_t kBytes = kStoredBytes<T>;
  const uint8_t* at = static_cast<const uint8_t*>(values);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const Wide v = load_wide<T>(at + i * kBytes);
    vst1q_f32(out + i, v.a);
    vst1q_f32(out + i + 4, v.b);
  }
  if (i < n) {
    const Wide v = load_tail<T>(at + i * kBytes, n - i);
    store_rows(out + i, v.a, n - i);
    store_rows(out + i + 4, v.b, n - i - 4);
  }
}

}  // namespace

void neon::dense_gemv(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                      int64_t row1) {
  with_stored(w.type, [&]<Stored T>() {
    multiply_dense<4, 2>(w, x, m, y, row0, row1,
                         [&]<int R, int M>(const float* xs, float* ys, int64_t row) {
                           dense_rows<T, R, M>(w, xs, ys, row);
                         });
  });
}

void neon::widen(const void* values, Stored type, float* out, int64_t n) {
  with_stored(type, [&]<Stored T>() { widen_type<T>(values, out, n); });
}

}  // namespace omq::cpu
