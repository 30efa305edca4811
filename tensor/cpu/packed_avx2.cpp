// The packed kernels' inner loops for AVX2 with FMA and F16C. Table and contract: packed_isa.h;
// layout: tensor/packed.h.
//
// gemv: a row of x becomes, chunk by chunk (≤ 128 columns of one group), whole numbers of 15 bits
// in int16 and one scale. Codes widen to 16 bits by mask and shift alone, because the two bytes of
// a 16-bit lane are neighbouring columns of one row: the low bytes are columns 0 and 2 of a quad,
// the high bytes 1 and 3. vpmaddwd then multiplies pairs and adds them in int32, which nothing here
// can overflow, whatever the width. A panel is two halves of 8 rows. A row of x that comes as codes
// takes the same loops, its codes less their zero point being the whole numbers. Many rows of
// codes: packed_avx2_codes.cpp; dense weights: packed_avx2_dense.cpp.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_avx2.h"

#include <cpuid.h>

namespace omq::cpu {

namespace {

bool runs_here() {
  unsigned a, b, c, d;
  constexpr unsigned kF16c = 1u << 29;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & kF16c) != 0;
}

// ---- prepared activations: one row = scales, sums, whole numbers, each padded to 64 bytes ----

struct Acts {
  const float* scale;  // [chunks]
  const int32_t* sum;  // [chunks] Σ of the whole numbers
  const int16_t* x;    // [chunks, chunk_stride], each quad in the order 0 2 1 3
};

int64_t prepared_bytes(const PanelView& w) {
  return 2 * list_bytes(w) + round_up(2 * w.chunks * w.chunk_stride, 64);
}

OMQ_INLINE Acts acts_at(const PanelView& w, const std::byte* row) {
  return {reinterpret_cast<const float*>(row),
          reinterpret_cast<const int32_t*>(row + list_bytes(w)),
          reinterpret_cast<const int16_t*>(row + 2 * list_bytes(w))};
}

// One chunk of n columns, zeros up to the end of its slot. A value that is not finite makes the
// scale NaN, so that it shows in every output that it touches. Rounds half to even, as the vector
// conversion does.
void prepare_chunk(const float* x, int64_t n, int64_t slot, float* scale, int32_t* sum,
                   int16_t* out) {
  float peak = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float a = __builtin_fabsf(x[i]);
    finite = finite && a <= __FLT_MAX__;
    peak = a > peak ? a : peak;
  }
  const bool flat = !finite || peak < 1e-30f;  // below: 1 / scale would overflow
  *scale = !finite ? __builtin_nanf("") : flat ? 0.0f : peak / kActMax;
  const float inverse = flat ? 0.0f : kActMax / peak;
  int32_t total = 0;
  for (int64_t i = 0; i < slot; ++i) {
    const float v = flat || i >= n ? 0.0f : x[i] * inverse;
    const int32_t whole = _mm_cvtss_si32(_mm_set_ss(v));
    const int64_t j = i & 3;
    out[(i & ~int64_t{3}) + (j == 1 ? 2 : j == 2 ? 1 : j)] = static_cast<int16_t>(whole);
    total += whole;
  }
  *sum = total;
}

void prepare(const PanelView& w, const float* x, std::byte* out) {
  const Acts a = acts_at(w, out);
  for_each_chunk(w, [&](int64_t chunk, int64_t col, int64_t n) {
    prepare_chunk(x + col, n, w.chunk_stride, const_cast<float*>(a.scale) + chunk,
                  const_cast<int32_t*>(a.sum) + chunk,
                  const_cast<int16_t*>(a.x) + chunk * w.chunk_stride);
  });
}

// One chunk of whole numbers from codes, as prepare_chunk.
void prepare_chunk(const uint8_t* codes, int32_t zero, int64_t n, int64_t slot, int32_t* sum,
                   int16_t* out) {
  int32_t total = 0;
  for (int64_t i = 0; i < slot; ++i) {
    const int32_t whole = i < n ? codes[i] - zero : 0;
    const int64_t j = i & 3;
    out[(i & ~int64_t{3}) + (j == 1 ? 2 : j == 2 ? 1 : j)] = static_cast<int16_t>(whole);
    total += whole;
  }
  *sum = total;
}

void prepare_codes_for_gemv(const PanelView& w, const RowCodes& x, std::byte* out) {
  const Acts a = acts_at(w, out);
  for_each_chunk(w, [&](int64_t chunk, int64_t col, int64_t n) {
    const_cast<float*>(a.scale)[chunk] = x.scale;
    prepare_chunk(x.codes + col, x.zero, n, w.chunk_stride, const_cast<int32_t*>(a.sum) + chunk,
                  const_cast<int16_t*>(a.x) + chunk * w.chunk_stride);
  });
}

// ---- y for P panels (streams) and M rows of x at once ----

OMQ_INLINE __m256i broadcast(const int16_t* x) {
  int32_t two_columns;
  __builtin_memcpy(&two_columns, x, 4);
  return _mm256_set1_epi32(two_columns);
}

template <int Bits, int P, int M>
OMQ_INLINE void chunk_dots(const uint8_t* low, const uint8_t* high, int64_t panel_bytes,
                           int64_t vectors, const Acts (&x)[M], int64_t at,
                           __m256i (&dot)[P][2][M]) {
  constexpr int Q = kQuads<Bits>;
  OMQ_UNROLL for (int p = 0; p < P; ++p) OMQ_UNROLL for (int m = 0; m < M; ++m) dot[p][0][m] =
      dot[p][1][m] = _mm256_setzero_si256();
  for (int64_t v = 0; v < vectors; ++v) OMQ_UNROLL for (int p = 0; p < P; ++p) {
      const uint8_t* lp = low + p * panel_bytes + v * 64;
      const uint8_t* hp = high + p * panel_bytes + v * 32;
      _mm_prefetch(reinterpret_cast<const char*>(lp + kPrefetchBytes), _MM_HINT_T0);
      if constexpr (Bits == 3)
        _mm_prefetch(reinterpret_cast<const char*>(hp + kPrefetchBytes), _MM_HINT_T0);
      OMQ_UNROLL for (int half = 0; half < 2; ++half) {
        const __m256i codes = load(lp + 32 * half);
        OMQ_UNROLL for (int s = 0; s < Q; ++s) {
          const Pairs q = unpack<Bits>(codes, hp + 4 * half, s);
          OMQ_UNROLL for (int m = 0; m < M; ++m) {
            const int16_t* xs = x[m].x + at + 4 * (Q * v + s);
            const __m256i pair = _mm256_add_epi32(_mm256_madd_epi16(q.even, broadcast(xs)),
                                                  _mm256_madd_epi16(q.odd, broadcast(xs + 2)));
            dot[p][half][m] = _mm256_add_epi32(dot[p][half][m], pair);
          }
        }
      }
    }
}

template <int Bits, int P, int M>
void gemv_panels(const PanelView& w, const std::byte* rows, float* y, int64_t panel) {
  constexpr int Q = kQuads<Bits>;
  const int64_t row_bytes = prepared_bytes(w);
  Acts x[M];
  __m256 total[P][2][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = acts_at(w, rows + m * row_bytes);
    OMQ_UNROLL for (int p = 0; p < P; ++p) total[p][0][m] = total[p][1][m] = _mm256_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols, ++chunk) {
      const int64_t vectors = (min64(w.chunk_cols, b.padded - c) / 4 + Q - 1) / Q;
      __m256i dot[P][2][M];
      chunk_dots<Bits, P, M>(block + c / 8 * Block<Bits>::kLowBytes, block + b.high + 2 * c,
                             w.panel_bytes, vectors, x, chunk * w.chunk_stride, dot);
      OMQ_UNROLL for (int p = 0; p < P; ++p) OMQ_UNROLL for (int half = 0; half < 2; ++half) {
        const uint8_t* grid = block + b.grid + p * w.panel_bytes;
        const __m256 scale = load_f16(grid + 16 * half);
        const __m256i zero = _mm256_cvtps_epi32(zeros_at(w, grid, half));
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          const __m256i off = _mm256_mullo_epi32(zero, _mm256_set1_epi32(x[m].sum[chunk]));
          const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot[p][half][m], off));
          total[p][half][m] = _mm256_fmadd_ps(
              value, _mm256_mul_ps(scale, _mm256_set1_ps(x[m].scale[chunk])), total[p][half][m]);
        }
      }
    }
  }
  OMQ_UNROLL for (int p = 0; p < P; ++p) OMQ_UNROLL for (int m = 0; m < M; ++m) {
    const int64_t row = (panel + p) * kRows;
    store_rows(y + m * w.rows + row, total[p][0][m], w.rows - row);
    store_rows(y + m * w.rows + row + 8, total[p][1][m], w.rows - row - 8);
  }
}

template <int Bits, int P, int M>
OMQ_INLINE void gemv_range(const PanelView& w, const std::byte* x, float* y, int64_t panel,
                           int64_t end) {
  for (; panel + P <= end; panel += P) gemv_panels<Bits, P, M>(w, x, y, panel);
  for (; panel < end; ++panel) gemv_panels<Bits, 1, M>(w, x, y, panel);
}

// Registers: 2 · P · M sums of the 16, so more rows of x leave fewer streams.
template <int Bits>
void gemv_bits(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
               int64_t panel1) {
  const int64_t row_bytes = prepared_bytes(w);
  for (; m >= 4; m -= 4, x += 4 * row_bytes, y += 4 * w.rows)
    gemv_range<Bits, 1, 4>(w, x, y, panel0, panel1);
  if (m == 3) gemv_range<Bits, 1, 3>(w, x, y, panel0, panel1);
  if (m == 2) gemv_range<Bits, 2, 2>(w, x, y, panel0, panel1);
  if (m == 1) gemv_range<Bits, 4, 1>(w, x, y, panel0, panel1);
}

void gemv(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1) {
  with_bits(w.bits, [&]<int Bits>() { gemv_bits<Bits>(w, x, m, y, panel0, panel1); });
}

// ---- dequantise ----

template <int Bits>
void dequantize_half(const PanelView& w, const uint8_t* block, int64_t g, int half, float* out,
                     int64_t ld) {
  constexpr int Q = kQuads<Bits>;
  const Block<Bits> b(w, g);
  const __m256i low16 = _mm256_set1_epi32(0xffff);
  const __m256 scale = load_f16(block + b.grid + 16 * half);
  const __m256 zero = zeros_at(w, block + b.grid, half);
  for (int64_t v = 0; 4 * Q * v < b.cols; ++v) {
    const __m256i codes = load(block + 64 * v + 32 * half);
    OMQ_UNROLL for (int s = 0; s < Q; ++s) {
      const Pairs q = unpack<Bits>(codes, block + b.high + 32 * v + 4 * half, s);
      const __m256i column[4] = {_mm256_and_si256(q.even, low16), _mm256_and_si256(q.odd, low16),
                                 _mm256_srli_epi32(q.even, 16), _mm256_srli_epi32(q.odd, 16)};
      const int64_t first = 4 * (Q * v + s), live = min64(4, b.cols - first);
      for (int64_t j = 0; j < live; ++j)
        _mm256_storeu_ps(out + (first + j) * ld,
                         _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_cvtepi32_ps(column[j]), zero)));
    }
  }
}

template <int Bits>
void dequantize_bits(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes, out += w.group_cols * ld) {
    dequantize_half<Bits>(w, block, g, 0, out, ld);
    dequantize_half<Bits>(w, block, g, 1, out + 8, ld);
  }
}

void dequantize(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  with_bits(w.bits, [&]<int Bits>() { dequantize_bits<Bits>(w, panel, out, ld); });
}

}  // namespace

const PackedIsa kAvx2Isa = {
    .name = "avx2",
    .runs_here = runs_here,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .gemv = gemv,
    .gemv_for_many_rows = false,
    .prepare_codes_for_gemv = prepare_codes_for_gemv,
    .gemm_codes = avx2::gemm_codes,
    .gemm_codes_scratch_bytes = avx2::gemm_codes_scratch_bytes,
    .dequantize = dequantize,
    .dense_gemv = avx2::dense_gemv,
    .widen = avx2::widen,
};

}  // namespace omq::cpu
