// The product of codes with codes for many rows of x (PackedIsa::gemm_codes) for AVX-512.
//
// One signed byte holds a code less an offset, so one plane does;
// panels are unpacked to bytes once.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_avx512.h"

namespace omq::cpu {

namespace {

// An unpacked panel, chunk by chunk: I32 [16], the sums of the codes, then 64 bytes a quad.

template <int Bits> void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  constexpr int Q = kQuads<Bits>;
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols) {
      const int64_t quads = min64(w.chunk_cols, b.padded - c) / 4;
      const uint8_t* step = block + b.codes_at(c);
      uint8_t* to = out + 64;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t q = 0; q < quads; q += Q, step += kStepBytes<Bits>) {
        __m512i quad[Q];
        unpack<Bits, false>(step, quad);
        OMQ_UNROLL for (int s = 0; s < Q; ++s, to += 64) {
          sum = _mm512_dpbusd_epi32(sum, quad[s], _mm512_set1_epi8(1));
          _mm512_store_si512(to, quad[s]);
        }
      }
      _mm512_store_si512(out, sum);
      out = to;
    }
  }
}

void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  with_bits(w.bits, [&]<int Bits>() { unpack_panel<Bits>(w, panel, out); });
}

// y of one panel for M rows of x.
template <int M>
void gemm_panel(const PanelView& w, const uint8_t* unpacked, int64_t panel, const std::byte* rows,
                float* y) {
  const int64_t row_bytes = prepared_codes_bytes(w);
  Bytes x[M];
  __m512 total[M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = bytes_at(w, rows + m * row_bytes);
    total[m] = _mm512_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const int64_t cols = padded_cols(w.bits, cols_of(w, g));
    const uint8_t* grid = block + cols * kRows * w.bits / 8;
    const __m512 scale = load_f16(grid);
    const __m512i zero = zeros_at(w, grid);
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk) {
      const int64_t quads = min64(w.chunk_cols, cols - c) / 4, at = chunk * w.chunk_stride;
      __m512i dot[M];
      OMQ_UNROLL for (int m = 0; m < M; ++m) dot[m] = _mm512_setzero_si512();
      for (int64_t q = 0; q < quads; ++q) {
        const __m512i codes = _mm512_load_si512(unpacked + 64 * (1 + q));
        OMQ_UNROLL for (int m = 0; m < M; ++m) dot[m] =
            _mm512_dpbusd_epi32(dot[m], codes, broadcast(x[m].x + at + 4 * q));
      }
      // Σ (code − zero), the surplus columns adding nothing.
      const __m512i code_sum = _mm512_sub_epi32(
          _mm512_load_si512(unpacked),
          _mm512_mullo_epi32(zero, _mm512_set1_epi32(static_cast<int32_t>(4 * quads))));
      OMQ_UNROLL for (int m = 0; m < M; ++m) {
        const __m512i off =
            _mm512_add_epi32(_mm512_mullo_epi32(zero, _mm512_set1_epi32(x[m].sum[chunk])),
                             _mm512_mullo_epi32(code_sum, _mm512_set1_epi32(x[m].rest)));
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(dot[m], off)),
                                   _mm512_mul_ps(scale, _mm512_set1_ps(x[m].scale)), total[m]);
      }
      unpacked += 64 * (1 + quads);
    }
  }
  const int64_t row = panel * kRows;
  OMQ_UNROLL for (int m = 0; m < M; ++m)
      _mm512_mask_storeu_ps(y + m * w.rows + row, first(w.rows - row), total[m]);
}

}  // namespace

int64_t avx512::gemm_codes_scratch_bytes(const PanelView& w) { return unpacked_panel_bytes(w, 1); }

// 12 rows of x at once: as many sums keep both multipliers busy through their latency.
void avx512::gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                        int64_t panel1, std::byte* scratch) {
  auto* unpacked = reinterpret_cast<uint8_t*>(scratch);
  multiply_unpacked<12, 6, 3, 1>(
      w, x, m, y, panel0, panel1, [&](int64_t panel) { unpack_panel(w, panel, unpacked); },
      [&]<int M>(int64_t panel, const std::byte* rows, float* ys) {
        gemm_panel<M>(w, unpacked, panel, rows, ys);
      });
}

}  // namespace omq::cpu
