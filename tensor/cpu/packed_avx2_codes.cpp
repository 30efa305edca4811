// The product of codes with codes for many rows of x (PackedIsa::gemm_codes) for AVX2.
//
// As in packed_avx2.cpp, vpmaddubsw's sums of nibbles stay in 16 bits for 8 quads, 8 · 2 · 15 · 128
// = 30720. Panels are unpacked to nibbles once, codes of 8 bits to two planes of them.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_avx2.h"

namespace omq::cpu {

namespace {

// An unpacked panel, chunk by chunk: I32 [16], the sums of the codes, then for each half its
// planes, 32 bytes a quad.

constexpr int64_t kQuadsInShort = 8;  // sums of so many quads stay in 16 bits

OMQ_INLINE int64_t planes_of(const PanelView& w) { return w.bits == 8 ? 2 : 1; }

template <int Bits, int Half>
OMQ_INLINE void unpack_half(const uint8_t* step, int64_t quads, uint8_t* sums, uint8_t* out) {
  constexpr int Q = kQuads<Bits>;
  const __m256i one8 = _mm256_set1_epi8(1), one16 = _mm256_set1_epi16(1),
                nibble = _mm256_set1_epi8(15);
  const auto store = [](uint8_t* at, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(at), v);
  };
  __m256i sum = _mm256_setzero_si256();
  for (int64_t q = 0; q < quads; step += kStepBytes<Bits>) {
    const HalfStep<Bits> v(step, Half);
    OMQ_UNROLL for (int s = 0; s < Q; ++s, ++q) {
      const __m256i code = v.bytes(s);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(code, one8), one16));
      if constexpr (Bits == 8) {
        store(out + 32 * q, _mm256_and_si256(code, nibble));
        store(out + 32 * (quads + q), _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble));
      } else {
        store(out + 32 * q, code);
      }
    }
  }
  store(sums, sum);
}

template <int Bits> void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols) {
      const int64_t quads = min64(w.chunk_cols, b.padded - c) / 4;
      const uint8_t* codes = block + b.codes_at(c);
      const int64_t half_bytes = 32 * planes_of(w) * quads;
      unpack_half<Bits, 0>(codes, quads, out, out + 64);
      unpack_half<Bits, 1>(codes, quads, out + 32, out + 64 + half_bytes);
      out += 64 + 2 * half_bytes;
    }
  }
}

void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  with_bits(w.bits, [&]<int Bits>() { unpack_panel<Bits>(w, panel, out); });
}

// Σ code · byte of a panel with M rows of x, by halves, in 16 bits: quad q of one plane.
template <int M>
OMQ_INLINE void short_dots(const uint8_t* const (&codes)[2], const Bytes (&x)[M], int64_t at,
                           int64_t q, __m256i (&sum)[2][M]) {
  const __m256i low = load(codes[0] + 32 * q), high = load(codes[1] + 32 * q);
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    int32_t four;
    __builtin_memcpy(&four, x[m].x + at + 4 * q, 4);
    const __m256i xs = _mm256_set1_epi32(four);
    sum[0][m] = _mm256_add_epi16(sum[0][m], _mm256_maddubs_epi16(low, xs));
    sum[1][m] = _mm256_add_epi16(sum[1][m], _mm256_maddubs_epi16(high, xs));
    settle(sum[0][m]);
    settle(sum[1][m]);
  }
}

template <int M> OMQ_INLINE void clear(__m256i (&v)[2][M]) {
  OMQ_UNROLL for (int m = 0; m < M; ++m) v[0][m] = v[1][m] = _mm256_setzero_si256();
}
template <int M> OMQ_INLINE void widen_into(__m256i (&dot)[2][M], const __m256i (&sum)[2][M]) {
  const __m256i one = _mm256_set1_epi16(1);
  OMQ_UNROLL for (int h = 0; h < 2; ++h) OMQ_UNROLL for (int m = 0; m < M; ++m) dot[h][m] =
      _mm256_add_epi32(dot[h][m], _mm256_madd_epi16(sum[h][m], one));
}

template <int M>
OMQ_INLINE void nibble_dots(const uint8_t* const (&codes)[2], int64_t quads, const Bytes (&x)[M],
                            int64_t at, __m256i (&dot)[2][M]) {
  clear(dot);
  __m256i sum[2][M];
  int64_t q = 0;
  for (; q + kQuadsInShort <= quads; q += kQuadsInShort) {
    clear(sum);
    OMQ_UNROLL for (int64_t i = 0; i < kQuadsInShort; ++i) short_dots(codes, x, at, q + i, sum);
    widen_into(dot, sum);
  }
  clear(sum);
  for (; q < quads; ++q) short_dots(codes, x, at, q, sum);
  widen_into(dot, sum);
}

// y of one panel for M rows of x.
template <int M>
void gemm_panel(const PanelView& w, const uint8_t* unpacked, int64_t panel, const std::byte* rows,
                float* y) {
  const int64_t row_bytes = prepared_codes_bytes(w), planes = planes_of(w);
  Bytes x[M];
  __m256 total[2][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = bytes_at(w, rows + m * row_bytes);
    total[0][m] = total[1][m] = _mm256_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const int64_t cols = padded_cols(w.bits, cols_of(w, g));
    const uint8_t* grid = block + cols * kRows * w.bits / 8;
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk) {
      const int64_t quads = min64(w.chunk_cols, cols - c) / 4, at = chunk * w.chunk_stride;
      const uint8_t* const low[2] = {unpacked + 64, unpacked + 64 + 32 * planes * quads};
      __m256i dot[2][M];
      nibble_dots(low, quads, x, at, dot);
      if (planes == 2) {
        const uint8_t* const high[2] = {low[0] + 32 * quads, low[1] + 32 * quads};
        __m256i upper[2][M];
        nibble_dots(high, quads, x, at, upper);
        OMQ_UNROLL for (int h = 0; h < 2; ++h) OMQ_UNROLL for (int m = 0; m < M; ++m) dot[h][m] =
            _mm256_add_epi32(dot[h][m], _mm256_slli_epi32(upper[h][m], 4));
      }
      OMQ_UNROLL for (int h = 0; h < 2; ++h) {
        const __m256 scale = load_f16(grid + 16 * h);
        const __m256i zero = zeros_at(w, grid, h);
        // Σ (code − zero), the surplus columns adding nothing.
        const __m256i codes = _mm256_sub_epi32(
            load(unpacked + 32 * h),
            _mm256_mullo_epi32(zero, _mm256_set1_epi32(static_cast<int32_t>(4 * quads))));
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          const __m256i off =
              _mm256_add_epi32(_mm256_mullo_epi32(zero, _mm256_set1_epi32(x[m].sum[chunk])),
                               _mm256_mullo_epi32(codes, _mm256_set1_epi32(x[m].rest)));
          total[h][m] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(dot[h][m], off)),
                              _mm256_mul_ps(scale, _mm256_set1_ps(x[m].scale)), total[h][m]);
        }
      }
      unpacked += 64 * (1 + planes * quads);
    }
  }
  const int64_t row = panel * kRows;
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    store_rows(y + m * w.rows + row, total[0][m], w.rows - row);
    store_rows(y + m * w.rows + row + 8, total[1][m], w.rows - row - 8);
  }
}

}  // namespace

int64_t avx2::gemm_codes_scratch_bytes(const PanelView& w) {
  return unpacked_panel_bytes(w, planes_of(w));
}

// 4 rows of x at once: 8 sums of the 16 registers.
void avx2::gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                      int64_t panel1, std::byte* scratch) {
  auto* unpacked = reinterpret_cast<uint8_t*>(scratch);
  multiply_unpacked<4, 3, 2, 1>(
      w, x, m, y, panel0, panel1, [&](int64_t panel) { unpack_panel(w, panel, unpacked); },
      [&]<int M>(int64_t panel, const std::byte* rows, float* ys) {
        gemm_panel<M>(w, unpacked, panel, rows, ys);
      });
}

}  // namespace omq::cpu
