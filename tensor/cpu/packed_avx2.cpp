// The packed kernels' inner loops for AVX2 with FMA and F16C. Table and contract: packed_isa.h;
// layout: tensor/packed.h.
//
// gemv: a row of x becomes, chunk by chunk (≤ 128 columns of one group), whole numbers of 15 bits
// and one scale, stored as two planes of signed bytes (packed_planes.h). vpmaddubsw multiplies a
// quad (8 rows × 4 columns, a byte a code) with 4 bytes of x and adds pairs in 16 bits, where it
// saturates; codes of at most 4 bits leave room for several quads, whose sums then widen to 32
// bits. A panel is two halves of 8 rows; several panels are walked at once, chunk by chunk, because
// one memory stream alone does not fill the bus. A row of x that comes as codes takes the same
// loops, its codes less their zero point being the whole numbers. Codes of 8 bits and many rows of
// x: packed_avx2_pairs.cpp; many rows of codes: packed_avx2_codes.cpp; dense weights:
// packed_avx2_dense.cpp.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_avx2.h"

#include <cpuid.h>

#include "tensor/cpu/packed_planes.h"

namespace omq::cpu {

namespace {

bool runs_here() {
  unsigned a, b, c, d;
  constexpr unsigned kF16c = 1u << 29;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & kF16c) != 0;
}

void prepare(const PanelView& w, const float* x, std::byte* out) {
  if (w.bits == 8) return avx2::prepare_pairs(w, x, out);
  for_each_chunk_out(w, out, [&](int64_t col, int64_t n, const ChunkOut& to) {
    prepare_chunk(
        x + col, n, to.slot, to.scale,
        to.sum, [&](int64_t i, __m256i v) __attribute__((always_inline)) {
          const __m256i hi = _mm256_srai_epi16(_mm256_add_epi16(v, _mm256_set1_epi16(128)), 8);
          const __m256i lo = _mm256_sub_epi16(v, _mm256_slli_epi16(hi, 8));
          const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(hi, lo), 0xd8);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to.hi + i), _mm256_castsi256_si128(both));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to.lo + i),
                           _mm256_extracti128_si256(both, 1));
        });
  });
}

void prepare_few_codes(const PanelView& w, const RowCodes& x, std::byte* out) {
  if (w.bits == 8) return avx2::prepare_codes_pairs(w, x, out);
  prepare_codes_for_gemv(w, x, out);
}

// ---- y for P panels (streams) and M rows of x at once ----

OMQ_INLINE __m256i broadcast(const int8_t* x) {
  int32_t four_columns;
  __builtin_memcpy(&four_columns, x, 4);
  return _mm256_set1_epi32(four_columns);
}

// Steps whose sums fit 16 bits: a quad adds at most 2 · (2ᵇ − 1) · 128.
template <int Bits>
inline constexpr int64_t kStepsInShort = (Bits == 2   ? 32
                                          : Bits == 3 ? 16
                                                      : 8) /
                                         kQuads<Bits>;

// Halves of neighbouring streams: number h is half h % 2 of stream h / 2.
constexpr int half_of(int h) { return h % 2; }

// Σ code · byte of x in 16 bits, for H halves and M rows of x, of their two planes.
template <int H, int M> struct ShortSums {
  __m256i hi[H][M], lo[H][M];

  OMQ_INLINE void clear() {
    OMQ_UNROLL for (int h = 0; h < H; ++h) OMQ_UNROLL for (int m = 0; m < M; ++m) hi[h][m] =
        lo[h][m] = _mm256_setzero_si256();
  }
  OMQ_INLINE void add(int h, int m, __m256i codes, __m256i x_hi, __m256i x_lo) {
    hi[h][m] = _mm256_add_epi16(hi[h][m], _mm256_maddubs_epi16(codes, x_hi));
    lo[h][m] = _mm256_add_epi16(lo[h][m], _mm256_maddubs_epi16(codes, x_lo));
    settle(hi[h][m]);
    settle(lo[h][m]);
  }
  OMQ_INLINE void widen_into(__m256i (&dot)[H][M]) const {
    OMQ_UNROLL for (int h = 0; h < H; ++h) OMQ_UNROLL for (int m = 0; m < M; ++m) {
      const __m256i high = _mm256_madd_epi16(hi[h][m], _mm256_set1_epi16(256));
      const __m256i low = _mm256_madd_epi16(lo[h][m], _mm256_set1_epi16(1));
      dot[h][m] = _mm256_add_epi32(dot[h][m], _mm256_add_epi32(high, low));
    }
  }
};

// Quad s of one step of each stream, H halves.
template <int Bits, int H, int M>
OMQ_INLINE void add_quad(const HalfStep<Bits> (&v)[H], const Acts (&x)[M], int64_t byte, int s,
                         ShortSums<H, M>& sums) {
  __m256i codes[H];
  OMQ_UNROLL for (int h = 0; h < H; ++h) codes[h] = v[h].bytes(s);
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    const __m256i x_hi = broadcast(x[m].hi + byte), x_lo = broadcast(x[m].lo + byte);
    OMQ_UNROLL for (int h = 0; h < H; ++h) sums.add(h, m, codes[h], x_hi, x_lo);
  }
}

// Σ code · x of one chunk, for H halves from First on.
template <int Bits, int First, int H, int M>
OMQ_INLINE void chunk_dots(const uint8_t* codes, int64_t stream_bytes, int64_t steps,
                           const Acts (&x)[M], int64_t at, __m256i (&dot)[H][M]) {
  constexpr int Q = kQuads<Bits>;
  OMQ_UNROLL for (int h = 0; h < H; ++h) OMQ_UNROLL for (int m = 0; m < M; ++m) dot[h][m] =
      _mm256_setzero_si256();
  for (int64_t i = 0; i < steps;) {
    const int64_t end = min64(steps, i + kStepsInShort<Bits>);
    ShortSums<H, M> sums;
    sums.clear();
    for (; i < end; ++i, codes += kStepBytes<Bits>, at += 4 * Q) {
      HalfStep<Bits> v[H];
      OMQ_UNROLL for (int h = 0; h < H; ++h) {
        const uint8_t* stream = codes + (First + h) / 2 * stream_bytes;
        if (half_of(First + h) == 0)
          OMQ_UNROLL for (int n = 0; n < kVectors<Bits>; ++n) prefetch(stream + 64 * n);
        v[h] = HalfStep<Bits>(stream, half_of(First + h));
      }
      OMQ_UNROLL for (int s = 0; s < Q; ++s) add_quad<Bits>(v, x, at + 4 * s, s, sums);
    }
    sums.widen_into(dot);
  }
}

// Both halves of P streams: together while their sums fit the 16 registers, else one after the
// other.
template <int Bits, int P, int M>
OMQ_INLINE void streams_dots(const uint8_t* codes, int64_t stream_bytes, int64_t steps,
                             const Acts (&x)[M], int64_t at, __m256i (&dot)[2 * P][M]) {
  if constexpr (P * M <= 2) {
    chunk_dots<Bits, 0, 2 * P, M>(codes, stream_bytes, steps, x, at, dot);
  } else {
    static_assert(P == 1);
    __m256i half[1][M];
    chunk_dots<Bits, 0, 1, M>(codes, 0, steps, x, at, half);
    OMQ_UNROLL for (int m = 0; m < M; ++m) dot[0][m] = half[0][m];
    chunk_dots<Bits, 1, 1, M>(codes, 0, steps, x, at, half);
    OMQ_UNROLL for (int m = 0; m < M; ++m) dot[1][m] = half[0][m];
  }
}

// Panels panel, panel + stride, … : P streams, Together of them at a time.
template <int Bits, int P, int M>
void gemv_panels(const PanelView& w, const std::byte* rows, float* y, int64_t panel,
                 int64_t stride) {
  constexpr int Q = kQuads<Bits>, Together = P % 2 == 0 && M == 1 ? 2 : 1;
  const int64_t row_bytes = prepared_bytes(w), stream_bytes = stride * w.panel_bytes;
  Acts x[M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) x[m] = acts_at(w, rows + m * row_bytes);
  __m256 total[2 * P][M];
  for (int h = 0; h < 2 * P; ++h)
    OMQ_UNROLL for (int m = 0; m < M; ++m) total[h][m] = _mm256_setzero_ps();
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols, ++chunk) {
      const int64_t steps = (min64(w.chunk_cols, b.padded - c) / 4 + Q - 1) / Q;
      for (int p = 0; p < P; p += Together) {
        const uint8_t* stream = block + p * stream_bytes;
        __m256i dot[2 * Together][M];
        streams_dots<Bits, Together, M>(stream + b.codes_at(c), stream_bytes, steps, x,
                                        chunk * w.chunk_stride, dot);
        OMQ_UNROLL for (int h = 0; h < 2 * Together; ++h) {
          const uint8_t* grid = stream + h / 2 * stream_bytes + b.grid;
          if (half_of(h) == 0) prefetch(grid);
          const __m256 scale = load_f16(grid + 16 * half_of(h));
          const __m256i zero = zeros_at(w, grid, half_of(h));
          OMQ_UNROLL for (int m = 0; m < M; ++m) total[2 * p + h][m] = add_chunk(
              total[2 * p + h][m], dot[h][m], zero, scale, x[m].sum[chunk], x[m].scale[chunk]);
        }
      }
    }
  }
  for (int h = 0; h < 2 * P; ++h) OMQ_UNROLL for (int m = 0; m < M; ++m) {
      const int64_t row = (panel + h / 2 * stride) * kRows + 8 * half_of(h);
      store_rows(y + m * w.rows + row, total[h][m], w.rows - row);
    }
}

template <int Bits>
void gemv_bits(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
               int64_t panel1) {
  gemv_streams(w, prepared_bytes(w), x, m, y, panel0, panel1,
               [&]<int P, int M>(auto... args) { gemv_panels<Bits, P, M>(w, args...); });
}

void gemv(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1) {
  if (w.bits == 2) return gemv_bits<2>(w, x, m, y, panel0, panel1);
  if (w.bits == 3) return gemv_bits<3>(w, x, m, y, panel0, panel1);
  if (w.bits == 4) return gemv_bits<4>(w, x, m, y, panel0, panel1);
  avx2::gemv_pairs(w, x, m, y, panel0, panel1);
}

// ---- dequantise ----

template <int Bits, int Half>
void dequantize_half(const PanelView& w, const uint8_t* block, int64_t g, float* out, int64_t ld) {
  constexpr int Q = kQuads<Bits>;
  const Block<Bits> b(w, g);
  const __m256i low16 = _mm256_set1_epi32(0xffff);
  const __m256 scale = load_f16(block + b.grid + 16 * Half);
  const __m256 zero = _mm256_cvtepi32_ps(zeros_at(w, block + b.grid, Half));
  for (int64_t v = 0; 4 * Q * v < b.cols; ++v) {
    const HalfStep<Bits> codes(block + kStepBytes<Bits> * v, Half);
    OMQ_UNROLL for (int s = 0; s < Q; ++s) {
      const Pairs q = codes.pairs(s);
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
    dequantize_half<Bits, 0>(w, block, g, out, ld);
    dequantize_half<Bits, 1>(w, block, g, out + 8, ld);
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
    .gemm_block_bytes = avx2::gemm_block_bytes,
    .prepare_gemm_block = avx2::prepare_gemm_block,
    .gemm = avx2::gemm,
    .gemm_scratch_bytes = avx2::gemm_scratch_bytes,
    .prepare_codes_for_gemv = prepare_few_codes,
    .gemm_codes = avx2::gemm_codes,
    .gemm_codes_scratch_bytes = avx2::gemm_codes_scratch_bytes,
    .dequantize = dequantize,
    .dense_gemv = avx2::dense_gemv,
    .widen = avx2::widen,
};

}  // namespace omq::cpu
