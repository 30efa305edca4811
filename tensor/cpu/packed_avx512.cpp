// The packed kernels' inner loops for AVX-512 with VNNI. Table and contract: packed_isa.h; layout:
// tensor/packed.h.
//
// gemv: a row of x becomes, chunk by chunk (≤ 128 columns of one group), whole numbers of 15 bits
// and one scale, stored as two planes of signed bytes, x ≈ s · (256·hi + lo): relative error 2e-5,
// so 16-bit activations stay what they are. The codes are VNNI's unsigned operand; a quad (16 rows
// × 4 columns) meets 4 bytes of x, broadcast. With whole zero points the chunk's sum Σ(code −
// zero)·x is exact in int32 and is scaled once. Several panels are walked at once: each is a memory
// stream of its own, prefetched ahead, and one stream alone does not fill the memory bus. A row of
// x that comes as codes takes the same loops, its codes less their zero point being the whole
// numbers. Many rows of codes: packed_avx512_codes.cpp; dense weights: packed_avx512_dense.cpp.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_avx512.h"
#include "tensor/cpu/packed_planes.h"

namespace omq::cpu {

bool avx512::runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

void avx512::prepare(const PanelView& w, const float* x, std::byte* out) {
  for_each_chunk_out(w, out, [&](int64_t col, int64_t n, const ChunkOut& to) {
    prepare_chunk(
        x + col, n, to.slot, to.scale,
        to.sum, [&](int64_t i, __m128i hi, __m128i lo) __attribute__((always_inline)) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to.hi + i), hi);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to.lo + i), lo);
        });
  });
}

namespace {

// ---- y for P panels (streams) and M rows of x at once ----

// Integer sums of one chunk. Registers: 2 · P · M of the 32 without Scaled, twice that with it.
template <int Bits, int P, int M> struct Sums {
  static constexpr bool kScaled = Bits <= 3 && M == 1;
  static constexpr int kKinds = kScaled ? 2 : 1;  // of codes: as they are, 4 times
  __m512i hi[P][M][kKinds], lo[P][M][kKinds];

  OMQ_INLINE void clear() {
    OMQ_UNROLL for (int p = 0; p < P; ++p) {
      OMQ_UNROLL for (int m = 0; m < M; ++m) {
        OMQ_UNROLL for (int k = 0; k < kKinds; ++k) {
          hi[p][m][k] = lo[p][m][k] = _mm512_setzero_si512();
        }
      }
    }
  }
  OMQ_INLINE void add(int p, int m, int quad, __m512i codes, __m512i x_hi, __m512i x_lo) {
    const int k = quad % kKinds;
    hi[p][m][k] = _mm512_dpbusd_epi32(hi[p][m][k], codes, x_hi);
    lo[p][m][k] = _mm512_dpbusd_epi32(lo[p][m][k], codes, x_lo);
  }
  OMQ_INLINE __m512i join(int p, int m, int k) const {
    return _mm512_add_epi32(_mm512_slli_epi32(hi[p][m][k], 8), lo[p][m][k]);
  }
  // Σ code · x, 16 rows.
  OMQ_INLINE __m512i dot(int p, int m) const {
    if constexpr (!kScaled) return join(p, m, 0);
    return _mm512_add_epi32(join(p, m, 0), _mm512_srai_epi32(join(p, m, kKinds - 1), Bits));
  }
};

template <int Bits, int P, int M>
OMQ_INLINE void chunk_sums(const uint8_t* codes, int64_t stream_bytes, int64_t steps,
                           const Acts (&x)[M], int64_t at, Sums<Bits, P, M>& sums) {
  constexpr int Q = kQuads<Bits>;
  sums.clear();
  for (int64_t v = 0; v < steps; ++v) {
    OMQ_UNROLL for (int p = 0; p < P; ++p) {
      const uint8_t* step = codes + p * stream_bytes + v * kStepBytes<Bits>;
      if constexpr (M <= 2)
        OMQ_UNROLL for (int n = 0; n < kVectors<Bits>; ++n) prefetch(step + 64 * n);
      __m512i quad[Q];
      unpack<Bits, Sums<Bits, P, M>::kScaled>(step, quad);
      OMQ_UNROLL for (int s = 0; s < Q; ++s) {
        const int64_t byte = at + 4 * (Q * v + s);
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          sums.add(p, m, s, quad[s], broadcast(x[m].hi + byte), broadcast(x[m].lo + byte));
        }
      }
    }
  }
}

// Panels panel, panel + stride, … : P streams.
template <int Bits, int P, int M>
void gemv_panels(const PanelView& w, const std::byte* rows, float* y, int64_t panel,
                 int64_t stride) {
  constexpr int Q = kQuads<Bits>;
  const int64_t row_bytes = prepared_bytes(w), stream_bytes = stride * w.panel_bytes;
  Acts x[M];
  __m512 total[P][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = acts_at(w, rows + m * row_bytes);
    OMQ_UNROLL for (int p = 0; p < P; ++p) total[p][m] = _mm512_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols, ++chunk) {
      const int64_t steps = (min64(w.chunk_cols, b.padded - c) / 4 + Q - 1) / Q;
      Sums<Bits, P, M> sums;
      chunk_sums<Bits, P, M>(block + b.codes_at(c), stream_bytes, steps, x, chunk * w.chunk_stride,
                             sums);
      OMQ_UNROLL for (int p = 0; p < P; ++p) {
        const uint8_t* grid = block + b.grid + p * stream_bytes;
        prefetch(grid);
        const __m512 scale = load_f16(grid);
        const __m512i zero = zeros_at(w, grid);
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          const __m512i off = _mm512_mullo_epi32(zero, _mm512_set1_epi32(x[m].sum[chunk]));
          const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums.dot(p, m), off));
          total[p][m] = _mm512_fmadd_ps(
              value, _mm512_mul_ps(scale, _mm512_set1_ps(x[m].scale[chunk])), total[p][m]);
        }
      }
    }
  }
  OMQ_UNROLL for (int p = 0; p < P; ++p) {
    const int64_t row = (panel + p * stride) * kRows;
    OMQ_UNROLL for (int m = 0; m < M; ++m) {
      _mm512_mask_storeu_ps(y + m * w.rows + row, first(w.rows - row), total[p][m]);
    }
  }
}

// Each stream takes a run of neighbouring panels, so that prefetching past a panel's end reaches
// what is read next.
template <int Bits, int P, int M>
OMQ_INLINE void gemv_range(const PanelView& w, const std::byte* x, float* y, int64_t panel,
                           int64_t end) {
  const int64_t run = (end - panel) / P;
  for (int64_t i = 0; i < run; ++i) gemv_panels<Bits, P, M>(w, x, y, panel + i, run);
  for (panel += P * run; panel < end; ++panel) gemv_panels<Bits, 1, M>(w, x, y, panel, 0);
}

template <int Bits>
void gemv_bits(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
               int64_t panel1) {
  const int64_t row_bytes = prepared_bytes(w);
  for (; m >= 4; m -= 4, x += 4 * row_bytes, y += 4 * w.rows)
    gemv_range<Bits, 2, 4>(w, x, y, panel0, panel1);
  if (m == 3) gemv_range<Bits, 2, 3>(w, x, y, panel0, panel1);
  if (m == 2) gemv_range<Bits, 4, 2>(w, x, y, panel0, panel1);
  if (m == 1) gemv_range<Bits, 4, 1>(w, x, y, panel0, panel1);
}

// ---- dequantise ----

template <int Bits>
void dequantize_bits(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  constexpr int Q = kQuads<Bits>;
  const __m512i byte = _mm512_set1_epi32(255);
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes, out += w.group_cols * ld) {
    const Block<Bits> b(w, g);
    const __m512 scale = load_f16(block + b.grid);
    const __m512 zero = _mm512_cvtepi32_ps(zeros_at(w, block + b.grid));
    for (int64_t v = 0; 4 * Q * v < b.cols; ++v) {
      __m512i quad[Q];
      unpack<Bits, false>(block + kStepBytes<Bits> * v, quad);
      OMQ_UNROLL for (int s = 0; s < Q; ++s) {
        const int64_t col = 4 * (Q * v + s);
        const int64_t live = min64(4, b.cols - col);
        for (int64_t j = 0; j < live; ++j, quad[s] = _mm512_srli_epi32(quad[s], 8)) {
          const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(quad[s], byte));
          _mm512_storeu_ps(out + (col + j) * ld, _mm512_mul_ps(scale, _mm512_sub_ps(code, zero)));
        }
      }
    }
  }
}

}  // namespace

void avx512::gemv(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                  int64_t panel1) {
  with_bits(w.bits, [&]<int Bits>() { gemv_bits<Bits>(w, x, m, y, panel0, panel1); });
}

void avx512::dequantize(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  with_bits(w.bits, [&]<int Bits>() { dequantize_bits<Bits>(w, panel, out, ld); });
}

const PackedIsa kAvx512Isa = {
    .name = "avx512",
    .runs_here = avx512::runs_here,
    .prepared_bytes = prepared_bytes,
    .prepare = avx512::prepare,
    .gemv = avx512::gemv,
    .gemv_for_many_rows = true,
    .prepare_codes_for_gemv = prepare_codes_for_gemv,
    .gemm_codes = avx512::gemm_codes,
    .gemm_codes_scratch_bytes = avx512::gemm_codes_scratch_bytes,
    .dequantize = avx512::dequantize,
    .dense_gemv = avx512::dense_gemv,
    .widen = avx512::widen,
};

}  // namespace omq::cpu
