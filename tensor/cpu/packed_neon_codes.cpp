// The product of codes with codes for many rows of x (PackedIsa::gemm_codes) for NEON.
//
// One signed byte holds a code less an offset, on both sides, so one plane does; panels are
// unpacked to bytes once. With both offsets taken into the zero points, every sum stays below 2³¹:
// Σ (code − offset) · byte and Σ byte · (zero − offset) are at most 128 · 128 · 32768 = 2²⁹, and
// rest · Σ (code − zero) at most 128 · 255 · 32768 < 2³⁰.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_neon.h"

namespace omq::cpu {

namespace {

// An unpacked panel, chunk by chunk: I32 [16], the sums of code − offset, then 64 bytes a quad.

template <int Bits> void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  constexpr int Q = kQuads<Bits>;
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols) {
      const int64_t quads = min64(w.chunk_cols, b.padded - c) / 4;
      const uint8_t* step = block + b.codes_at(c);
      int8_t* to = reinterpret_cast<int8_t*>(out + 64);
      int32x4_t sum[kQuarters];
      OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) sum[r] = vdupq_n_s32(0);
      for (int64_t q = 0; q < quads; q += Q, step += kStepBytes<Bits>, to += 64 * Q) {
        OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) {
          const QuarterStep<Bits> v(step, r);
          each<Q>([&]<int S>() __attribute__((always_inline)) {
            const int8x16_t codes = v.template codes<S>();
            sum[r] = vdotq_s32(sum[r], codes, vdupq_n_s8(1));
            vst1q_s8(to + 64 * S + 16 * r, codes);
          });
        }
      }
      OMQ_UNROLL for (int r = 0; r < kQuarters; ++r)
          vst1q_s32(reinterpret_cast<int32_t*>(out) + 4 * r, sum[r]);
      out += 64 * (1 + quads);
    }
  }
}

void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  with_bits(w.bits, [&]<int Bits>() { unpack_panel<Bits>(w, panel, out); });
}

template <int M> using Dots = int32x4_t[kQuarters][M];

// The next N quads.
template <int N, int M>
OMQ_INLINE void add_quads(const uint8_t* unpacked, const Bytes (&x)[M], int64_t at, Dots<M>& dot) {
  int8x16_t xs[M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) xs[m] = load_quads<N>(x[m].x + at);
  each<N>([&]<int S>() __attribute__((always_inline)) {
    OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) {
      const int8x16_t codes = vreinterpretq_s8_u8(vld1q_u8(unpacked + 64 * S + 16 * r));
      OMQ_UNROLL for (int m = 0; m < M; ++m) dot[r][m] =
          vdotq_laneq_s32(dot[r][m], codes, xs[m], S);
    }
  });
}

// y of one panel for M rows of x.
template <int M>
void gemm_panel(const PanelView& w, const uint8_t* unpacked, int64_t panel, const std::byte* rows,
                float* y) {
  const int64_t row_bytes = prepared_codes_bytes(w);
  Bytes x[M];
  float32x4_t total[kQuarters][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = bytes_at(w, rows + m * row_bytes);
    OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) total[r][m] = vdupq_n_f32(0.0f);
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const int64_t cols = padded_cols(w.bits, cols_of(w, g));
    const uint8_t* grid = block + cols * kRows * w.bits / 8;
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk) {
      const int64_t quads = min64(w.chunk_cols, cols - c) / 4, at = chunk * w.chunk_stride;
      Dots<M> dot;
      OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) {
        OMQ_UNROLL for (int m = 0; m < M; ++m) dot[r][m] = vdupq_n_s32(0);
      }
      int64_t q = 0;
      for (; q + 4 <= quads; q += 4) add_quads<4>(unpacked + 64 * (1 + q), x, at + 4 * q, dot);
      for (; q < quads; ++q) add_quads<1>(unpacked + 64 * (1 + q), x, at + 4 * q, dot);
      OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) {
        const float32x4_t scale = scales_at(grid, r);
        const int32x4_t zero = zeros_at(w, grid, r);
        // Σ (code − zero), the surplus columns adding nothing.
        const int32x4_t code_sum =
            vmlsq_n_s32(vld1q_s32(reinterpret_cast<const int32_t*>(unpacked) + 4 * r), zero,
                        static_cast<int32_t>(4 * quads));
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          const int32x4_t off =
              vmlaq_n_s32(vmulq_n_s32(zero, x[m].sum[chunk]), code_sum, x[m].rest);
          total[r][m] = vfmaq_f32(total[r][m], vcvtq_f32_s32(vsubq_s32(dot[r][m], off)),
                                  vmulq_n_f32(scale, x[m].scale));
        }
      }
      unpacked += 64 * (1 + quads);
    }
  }
  OMQ_UNROLL for (int r = 0; r < kQuarters; ++r) {
    const int64_t row = panel * kRows + 4 * r;
    OMQ_UNROLL for (int m = 0; m < M; ++m)
        store_rows(y + m * w.rows + row, total[r][m], w.rows - row);
  }
}

}  // namespace

int64_t neon::gemm_codes_scratch_bytes(const PanelView& w) { return unpacked_panel_bytes(w, 1); }

// 4 rows of x at once: 16 sums of the 32 registers, and 4 registers of x.
void neon::gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                      int64_t panel1, std::byte* scratch) {
  auto* unpacked = reinterpret_cast<uint8_t*>(scratch);
  multiply_unpacked<4, 3, 2, 1>(
      w, x, m, y, panel0, panel1, [&](int64_t panel) { unpack_panel(w, panel, unpacked); },
      [&]<int M>(int64_t panel, const std::byte* rows, float* ys) {
        gemm_panel<M>(w, unpacked, panel, rows, ys);
      });
}

}  // namespace omq::cpu
