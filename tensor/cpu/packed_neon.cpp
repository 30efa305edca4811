// The packed kernels' inner loops for ARMv8.2-A with NEON's dot product (64 bits). Table and
// contract: packed_isa.h; layout: tensor/packed.h.
//
// gemv: a row of x becomes two planes of signed bytes and one scale, chunk by chunk
// (packed_planes.h). vdotq_laneq_s32 multiplies a register of codes, 4 rows × 4 columns, by 4 bytes
// of x that it takes from one lane, so that 16 columns of x are one load and no broadcasts. Codes
// are signed there too: less an offset, which the zero point is lessened by as well
// (packed_neon.h). Nothing
// overflows int32: with |code − offset| and |zero − offset| ≤ 128, Σ (code − offset) · x and its
// correction are at most 2³⁰ each, a sum of planes at most 2³⁰ + 2²⁹, and the difference of the two
// is what packed_isa.h bounds. A row of x that comes as codes takes the same loops, its codes less
// their zero point being the whole numbers. Many rows of codes: packed_neon_codes.cpp; dense
// weights: packed_neon_dense.cpp.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_neon.h"

#include <sys/auxv.h>

#include "tensor/cpu/packed_planes.h"

namespace omq::cpu {

namespace {

bool runs_here() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

// ---- prepared activations ----

// Columns i … i + 3 of n, zeros past the end.
OMQ_INLINE float32x4_t load_part(const float* x, int64_t i, int64_t n) {
  if (i + 4 <= n) return vld1q_f32(x + i);
  float buffer[4] = {};
  for (int64_t j = i; j < n; ++j) buffer[j - i] = x[j];
  return vld1q_f32(buffer);
}

// The low bytes of 16 whole numbers.
OMQ_INLINE int8x16_t low_bytes(const int32x4_t (&v)[4]) {
  const auto bytes = [](int32x4_t a) { return vreinterpretq_s8_s32(a); };
  const int8x16_t a = vuzp1q_s8(bytes(v[0]), bytes(v[1]));
  const int8x16_t b = vuzp1q_s8(bytes(v[2]), bytes(v[3]));
  return vuzp1q_s8(a, b);
}

// One chunk of n columns. A value that is not finite makes the scale NaN, so that it shows in every
// output that it touches. Rounds half to even.
void prepare_chunk(const float* x, int64_t n, const ChunkOut& to) {
  float32x4_t top = vdupq_n_f32(0.0f);
  for (int64_t i = 0; i < n; i += 4) top = vmaxq_f32(top, vabsq_f32(load_part(x, i, n)));
  const float peak = vmaxvq_f32(top);  // NaN when any is
  const bool finite = peak <= __FLT_MAX__;
  const bool flat = !finite || peak < 1e-30f;  // below: 1 / scale would overflow
  *to.scale = !finite ? __builtin_nanf("") : flat ? 0.0f : peak / kActMax;
  const float inverse = flat ? 0.0f : kActMax / peak;
  int32x4_t total = vdupq_n_s32(0);
  for (int64_t i = 0; i < to.slot; i += 16) {
    int32x4_t v[4], h[4];
    OMQ_UNROLL for (int k = 0; k < 4; ++k) {
      // NaN, also of 0 · ∞, becomes the whole number 0.
      v[k] = vcvtnq_s32_f32(vmulq_n_f32(load_part(x, i + 4 * k, n), inverse));
      h[k] = vrshrq_n_s32(v[k], 8);
      total = vaddq_s32(total, v[k]);
    }
    vst1q_s8(to.hi + i, low_bytes(h));
    vst1q_s8(to.lo + i, low_bytes(v));
  }
  *to.sum = vaddvq_s32(total);
}

void prepare(const PanelView& w, const float* x, std::byte* out) {
  for_each_chunk_out(
      w, out, [&](int64_t col, int64_t n, const ChunkOut& to) { prepare_chunk(x + col, n, to); });
}

// ---- y for P panels (streams), R quarters of each and M rows of x at once ----

// Integer sums of one chunk: 2 · P · R · M of the 32 registers.
template <int P, int R, int M> struct Sums {
  int32x4_t hi[P][R][M], lo[P][R][M];

  OMQ_INLINE void clear() {
    OMQ_UNROLL for (int p = 0; p < P; ++p) {
      OMQ_UNROLL for (int r = 0; r < R; ++r) {
        OMQ_UNROLL for (int m = 0; m < M; ++m) hi[p][r][m] = lo[p][r][m] = vdupq_n_s32(0);
      }
    }
  }
  // Σ (code − offset) · x, 4 rows.
  OMQ_INLINE int32x4_t dot(int p, int r, int m) const {
    return vaddq_s32(vshlq_n_s32(hi[p][r][m], 8), lo[p][r][m]);
  }
};

// Where chunk_sums stands in the codes of the first panel and in x.
struct Place {
  const uint8_t* codes;
  int64_t stream_bytes, x;
  int quarter;  // the first of R
};

// The next N steps of every stream, at most 16 columns, or one of 32.
template <int Bits, int N, int P, int R, int M>
OMQ_INLINE void add_steps(const Place& at, const Acts (&x)[M], Sums<P, R, M>& sums) {
  constexpr int Q = kQuads<Bits>, kLoads = Q > 4 ? Q / 4 : 1;  // of x
  int8x16_t x_hi[M][kLoads], x_lo[M][kLoads];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    OMQ_UNROLL for (int i = 0; i < kLoads; ++i) {
      x_hi[m][i] = load_quads<N * Q / kLoads>(x[m].hi + at.x + 16 * i);
      x_lo[m][i] = load_quads<N * Q / kLoads>(x[m].lo + at.x + 16 * i);
    }
  }
  OMQ_UNROLL for (int p = 0; p < P; ++p) {
    each<N>([&]<int V>() __attribute__((always_inline)) {
      const uint8_t* step = at.codes + p * at.stream_bytes + kStepBytes<Bits> * V;
      if constexpr (M <= 2)
        OMQ_UNROLL for (int n = 0; n < kVectors<Bits>; ++n)
            __builtin_prefetch(step + 64 * n + kPrefetchBytes);
      OMQ_UNROLL for (int r = 0; r < R; ++r) {
        const QuarterStep<Bits> v(step, at.quarter + r);
        each<Q>([&]<int S>() __attribute__((always_inline)) {
          const int8x16_t codes = v.template codes<S>();
          constexpr int kQuad = Q * V + S;
          OMQ_UNROLL for (int m = 0; m < M; ++m) {
            int32x4_t &hi = sums.hi[p][r][m], &lo = sums.lo[p][r][m];
            hi = vdotq_laneq_s32(hi, codes, x_hi[m][kQuad / 4], kQuad % 4);
            lo = vdotq_laneq_s32(lo, codes, x_lo[m][kQuad / 4], kQuad % 4);
          }
        });
      }
    });
  }
}

template <int Bits, int P, int R, int M>
OMQ_INLINE void chunk_sums(Place at, int64_t steps, const Acts (&x)[M], Sums<P, R, M>& sums) {
  constexpr int Q = kQuads<Bits>, kFull = Q > 4 ? 1 : 4 / Q;  // steps of 16 columns
  sums.clear();
  for (; steps >= kFull; steps -= kFull) {
    add_steps<Bits, kFull>(at, x, sums);
    at.codes += kStepBytes<Bits> * kFull, at.x += 4 * Q * kFull;
  }
  if constexpr (kFull > 1)
    for (; steps > 0; --steps) {
      add_steps<Bits, 1>(at, x, sums);
      at.codes += kStepBytes<Bits>, at.x += 4 * Q;
    }
}

// Panels panel, panel + stride, … : P streams.
template <int Bits, int P, int R, int M>
void gemv_panels(const PanelView& w, const std::byte* rows, float* y, int64_t panel,
                 int64_t stride) {
  constexpr int Q = kQuads<Bits>;
  const int64_t row_bytes = prepared_bytes(w), stream_bytes = stride * w.panel_bytes;
  Acts x[M];
  float32x4_t total[P][kQuarters][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = acts_at(w, rows + m * row_bytes);
    OMQ_UNROLL for (int p = 0; p < P; ++p) {
      OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) total[p][r][m] = vdupq_n_f32(0.0f);
    }
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols, ++chunk) {
      const int64_t steps = (min64(w.chunk_cols, b.padded - c) / 4 + Q - 1) / Q;
      OMQ_UNROLL for (int quarter = 0; quarter < kQuarters; quarter += R) {
        Sums<P, R, M> sums;
        chunk_sums<Bits>({block + b.codes_at(c), stream_bytes, chunk * w.chunk_stride, quarter},
                         steps, x, sums);
        OMQ_UNROLL for (int p = 0; p < P; ++p) {
          const uint8_t* grid = block + b.grid + p * stream_bytes;
          OMQ_UNROLL for (int r = 0; r < R; ++r) {
            const float32x4_t scale = scales_at(grid, quarter + r);
            const int32x4_t zero = zeros_at(w, grid, quarter + r);
            OMQ_UNROLL for (int m = 0; m < M; ++m) {
              const int32x4_t off = vmulq_n_s32(zero, x[m].sum[chunk]);
              const float32x4_t value = vcvtq_f32_s32(vsubq_s32(sums.dot(p, r, m), off));
              float32x4_t& y4 = total[p][quarter + r][m];
              y4 = vfmaq_f32(y4, value, vmulq_n_f32(scale, x[m].scale[chunk]));
            }
          }
        }
      }
    }
  }
  OMQ_UNROLL for (int p = 0; p < P; ++p) {
    OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) {
      const int64_t row = (panel + p * stride) * kRows + 4 * r;
      OMQ_UNROLL for (int m = 0; m < M; ++m) {
        store_rows(y + m * w.rows + row, total[p][r][m], w.rows - row);
      }
    }
  }
}

// Each stream takes a run of neighbouring panels, so that prefetching past a panel's end reaches
// what is read next.
template <int Bits, int P, int R, int M>
OMQ_INLINE void gemv_range(const PanelView& w, const std::byte* x, float* y, int64_t panel,
                           int64_t end) {
  const int64_t run = (end - panel) / P;
  for (int64_t i = 0; i < run; ++i) gemv_panels<Bits, P, R, M>(w, x, y, panel + i, run);
  if constexpr (P > 1)
    for (panel += P * run; panel < end; ++panel) gemv_panels<Bits, 1, R, M>(w, x, y, panel, 0);
}

// 3 and 4 rows of x take a panel by halves: 12 and 16 sums, and 6 and 8 registers of x. One row
// walks two panels, but one of 3 bits, which need registers to unpack.
template <int Bits>
void gemv_bits(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
               int64_t panel1) {
  const int64_t row_bytes = prepared_bytes(w);
  for (; m >= 4; m -= 4, x += 4 * row_bytes, y += 4 * w.rows)
    gemv_range<Bits, 1, 2, 4>(w, x, y, panel0, panel1);
  if (m == 3) gemv_range<Bits, 1, 2, 3>(w, x, y, panel0, panel1);
  if (m == 2) gemv_range<Bits, 1, 4, 2>(w, x, y, panel0, panel1);
  if (m == 1) gemv_range<Bits, Bits == 3 ? 1 : 2, 4, 1>(w, x, y, panel0, panel1);
}

void gemv(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1) {
  with_bits(w.bits, [&]<int Bits>() { gemv_bits<Bits>(w, x, m, y, panel0, panel1); });
}

// ---- dequantise ----

// Byte J of every word, with its sign.
template <int J> OMQ_INLINE int32x4_t byte_of(int32x4_t words) {
  if constexpr (J == 3) return vshrq_n_s32(words, 24);
  return vshrq_n_s32(vshlq_n_s32(words, 24 - 8 * J), 24);
}

template <int Bits>
void dequantize_bits(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  constexpr int Q = kQuads<Bits>;
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes, out += w.group_cols * ld) {
    const Block<Bits> b(w, g);
    float32x4_t scale[kQuarters], zero[kQuarters];
    OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) {
      scale[r] = scales_at(block + b.grid, r);
      zero[r] = vcvtq_f32_s32(zeros_at(w, block + b.grid, r));
    }
    for (int64_t v = 0; 4 * Q * v < b.cols; ++v) {
      OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) {
        const QuarterStep<Bits> codes(block + kStepBytes<Bits> * v, r);
        each<Q>([&]<int S>() __attribute__((always_inline)) {
          const int32x4_t quad = vreinterpretq_s32_s8(codes.template codes<S>());
          const int64_t col = 4 * (Q * v + S);
          each<4>([&]<int J>() __attribute__((always_inline)) {
            if (col + J >= b.cols) return;
            const float32x4_t code = vcvtq_f32_s32(byte_of<J>(quad));
            vst1q_f32(out + (col + J) * ld + 4 * r, vmulq_f32(scale[r], vsubq_f32(code, zero[r])));
          });
        });
      }
    }
  }
}

void dequantize(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  with_bits(w.bits, [&]<int Bits>() { dequantize_bits<Bits>(w, panel, out, ld); });
}

}  // namespace

// gemv for many rows, counted in GCC 12's loops and not timed on a processor: 4 rows of x are 512
// multiply-adds in 91 … 104 instructions at 4 bits, 105 … 119 at 2 and 8, 132 … 139 at 3, unpacking
// included; F32 takes 128 and its loads, and a pass to dequantise.
const PackedIsa kNeonIsa = {
    .name = "neon",
    .runs_here = runs_here,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .gemv = gemv,
    .gemv_for_many_rows = true,
    .prepare_codes_for_gemv = prepare_codes_for_gemv,
    .gemm_codes = neon::gemm_codes,
    .gemm_codes_scratch_bytes = neon::gemm_codes_scratch_bytes,
    .dequantize = dequantize,
    .dense_gemv = neon::dense_gemv,
    .widen = neon::widen,
};

}  // namespace omq::cpu
