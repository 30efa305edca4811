// Products of pairs of 16-bit numbers for AVX2: many rows of x as floats (PackedIsa::gemm) at every
// width, and few rows at 8 bits (PackedIsa::gemv).
//
// The whole numbers of 15 bits that packed_avx2.cpp splits in two planes stay whole here, in int16,
// and so do the codes: vpmaddwd multiplies pairs and adds them in int32, which nothing here can
// overflow. For many rows that is as many instructions as F32's multiply-adds, which run at half
// their rate, and the sums are gemv's, so are the bits of y; codes of 8 bits would be four products
// of planes. Columns of many rows go in pieces: a piece of a panel is unpacked once and stays in
// the first-level cache while all rows of x pass by.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_avx2.h"
#include "tensor/cpu/packed_planes.h"

namespace omq::cpu {

namespace {

// A prepared row = scales, sums, whole numbers, in the room of packed_planes.h: prepared_bytes().
struct Row {
  const float* scale;  // [chunks]
  const int32_t* sum;  // [chunks] Σ of the whole numbers
  const int16_t* x;    // [chunks, chunk_stride], each quad in the order 0 2 1 3
};

OMQ_INLINE Row row_at(const PanelView& w, const std::byte* row) {
  return {reinterpret_cast<const float*>(row),
          reinterpret_cast<const int32_t*>(row + list_bytes(w)),
          reinterpret_cast<const int16_t*>(row + 2 * list_bytes(w))};
}

}  // namespace

void avx2::prepare_pairs(const PanelView& w, const float* x, std::byte* out) {
  const Row row = row_at(w, out);
  for_each_chunk(w, [&](int64_t chunk, int64_t col, int64_t n) {
    auto* to = const_cast<int16_t*>(row.x) + chunk * w.chunk_stride;
    prepare_chunk(
        x + col, n, w.chunk_stride, const_cast<float*>(row.scale) + chunk,
        const_cast<int32_t*>(row.sum) + chunk,
        [&](int64_t i, __m256i v) __attribute__((always_inline)) {
          const __m256i order =
              _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2,
                               3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_shuffle_epi8(v, order));
        });
  });
}

void avx2::prepare_codes_pairs(const PanelView& w, const RowCodes& x, std::byte* out) {
  const Row row = row_at(w, out);
  for_each_chunk(w, [&](int64_t chunk, int64_t col, int64_t n) {
    auto* to = const_cast<int16_t*>(row.x) + chunk * w.chunk_stride;
    int32_t total = 0;
    for (int64_t i = 0; i < w.chunk_stride; ++i) {
      const int32_t whole = i < n ? x.codes[col + i] - x.zero : 0;
      const int64_t j = i & 3;
      to[(i & ~int64_t{3}) + (j == 1 ? 2 : j == 2 ? 1 : j)] = static_cast<int16_t>(whole);
      total += whole;
    }
    const_cast<float*>(row.scale)[chunk] = x.scale;
    const_cast<int32_t*>(row.sum)[chunk] = total;
  });
}

namespace {

OMQ_INLINE __m256i broadcast(const int16_t* x) {
  int32_t two_columns;
  __builtin_memcpy(&two_columns, x, 4);
  return _mm256_set1_epi32(two_columns);
}

// ---- few rows at 8 bits: P panels (streams) and M rows of x at once ----

template <int P, int M>
void gemv_panels(const PanelView& w, const std::byte* rows, float* y, int64_t panel,
                 int64_t stride) {
  const int64_t stream_bytes = stride * w.panel_bytes;
  Row x[M];
  __m256 total[P][2][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = row_at(w, rows + m * prepared_bytes(w));
    OMQ_UNROLL for (int p = 0; p < P; ++p) total[p][0][m] = total[p][1][m] = _mm256_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<8> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols, ++chunk) {
      const int64_t quads = min64(w.chunk_cols, b.padded - c) / 4;
      __m256i dot[P][2][M];
      OMQ_UNROLL for (int p = 0; p < P; ++p) OMQ_UNROLL for (int m = 0; m < M; ++m) dot[p][0][m] =
          dot[p][1][m] = _mm256_setzero_si256();
      for (int64_t q = 0; q < quads; ++q) OMQ_UNROLL for (int p = 0; p < P; ++p) {
          const uint8_t* codes = block + p * stream_bytes + c * kRows + 64 * q;
          prefetch(codes);
          OMQ_UNROLL for (int half = 0; half < 2; ++half) {
            const Pairs pairs = HalfStep<8>(codes, half).pairs(0);
            OMQ_UNROLL for (int m = 0; m < M; ++m) {
              const int16_t* xs = x[m].x + chunk * w.chunk_stride + 4 * q;
              dot[p][half][m] = _mm256_add_epi32(
                  dot[p][half][m],
                  _mm256_add_epi32(_mm256_madd_epi16(pairs.even, broadcast(xs)),
                                   _mm256_madd_epi16(pairs.odd, broadcast(xs + 2))));
            }
          }
        }
      OMQ_UNROLL for (int p = 0; p < P; ++p) {
        const uint8_t* stream = block + p * stream_bytes;
        prefetch(stream + b.grid);
        OMQ_UNROLL for (int half = 0; half < 2; ++half) {
          const __m256 scale = load_f16(stream + b.grid + 16 * half);
          const __m256i zero = zeros_at(w, stream + b.grid, half);
          OMQ_UNROLL for (int m = 0; m < M; ++m) total[p][half][m] = add_chunk(
              total[p][half][m], dot[p][half][m], zero, scale, x[m].sum[chunk], x[m].scale[chunk]);
        }
      }
    }
  }
  OMQ_UNROLL for (int p = 0; p < P; ++p) OMQ_UNROLL for (int m = 0; m < M; ++m) {
    const int64_t row = (panel + p * stride) * kRows;
    store_rows(y + m * w.rows + row, total[p][0][m], w.rows - row);
    store_rows(y + m * w.rows + row + 8, total[p][1][m], w.rows - row - 8);
  }
}

}  // namespace

void avx2::gemv_pairs(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                      int64_t panel1) {
  gemv_streams(w, prepared_bytes(w), x, m, y, panel0, panel1,
               [&]<int P, int M>(auto... args) { gemv_panels<P, M>(w, args...); });
}

namespace {

// ---- many rows: a piece of a panel ----

constexpr int64_t kPieceCols = 512;  // 16 KiB of codes, and 4 of four rows of x, in the L1 cache

// One chunk of a piece; its codes follow, 128 bytes a quad: the pairs of one half of the panel,
// even and odd, then those of the other.
struct alignas(64) Chunk {
  float scale[kRows];
  int32_t zero[kRows];
  int64_t quads;
};
constexpr int64_t kQuadBytes = 128;

template <int Bits>
OMQ_INLINE void unpack_chunk(const PanelView& w, const uint8_t* step, const uint8_t* grid,
                             int64_t quads, std::byte* out) {
  constexpr int Q = kQuads<Bits>;
  auto* chunk = reinterpret_cast<Chunk*>(out);
  chunk->quads = quads;
  OMQ_UNROLL for (int half = 0; half < 2; ++half) {
    _mm256_store_ps(chunk->scale + 8 * half, load_f16(grid + 16 * half));
    _mm256_store_si256(reinterpret_cast<__m256i*>(chunk->zero + 8 * half), zeros_at(w, grid, half));
  }
  auto* to = reinterpret_cast<__m256i*>(out + sizeof(Chunk));
  for (int64_t q = 0; q < quads; step += kStepBytes<Bits>) {
    const HalfStep<Bits> upper(step, 0), lower(step, 1);
    OMQ_UNROLL for (int s = 0; s < Q; ++s, ++q, to += 4) {
      const Pairs first = upper.pairs(s), second = lower.pairs(s);
      _mm256_store_si256(to, first.even);
      _mm256_store_si256(to + 1, first.odd);
      _mm256_store_si256(to + 2, second.even);
      _mm256_store_si256(to + 3, second.odd);
    }
  }
}

// y of one panel for M rows of x, the chunks of one piece added to what y holds.
template <int M>
void multiply_piece(const PanelView& w, const std::byte* piece, int64_t first_chunk, int64_t chunks,
                    const std::byte* rows, float* y, int64_t live) {
  const int64_t stride = prepared_bytes(w);
  Row x[M];
  __m256 total[2][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = row_at(w, rows + m * stride);
    OMQ_UNROLL for (int h = 0; h < 2; ++h) total[h][m] =
        first_chunk == 0 ? _mm256_setzero_ps() : load_first(y + m * w.rows + 8 * h, live - 8 * h);
  }
  for (int64_t c = first_chunk; c < first_chunk + chunks; ++c) {
    const auto* chunk = reinterpret_cast<const Chunk*>(piece);
    const auto* codes = reinterpret_cast<const __m256i*>(piece + sizeof(Chunk));
    const int16_t* xs[M];
    __m256i dot[2][M];
    OMQ_UNROLL for (int m = 0; m < M; ++m) {
      xs[m] = x[m].x + c * w.chunk_stride;
      dot[0][m] = dot[1][m] = _mm256_setzero_si256();
    }
    for (int64_t q = 0; q < chunk->quads; ++q, codes += 4) {
      OMQ_UNROLL for (int parity = 0; parity < 2; ++parity) {
        const __m256i first = codes[parity], second = codes[parity + 2];
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          const __m256i pair = broadcast(xs[m] + 4 * q + 2 * parity);
          dot[0][m] = _mm256_add_epi32(dot[0][m], _mm256_madd_epi16(first, pair));
          dot[1][m] = _mm256_add_epi32(dot[1][m], _mm256_madd_epi16(second, pair));
          settle(dot[0][m]);
          settle(dot[1][m]);
        }
      }
    }
    OMQ_UNROLL for (int h = 0; h < 2; ++h) {
      const __m256 scale = _mm256_load_ps(chunk->scale + 8 * h);
      const __m256i zero = load(chunk->zero + 8 * h);
      OMQ_UNROLL for (int m = 0; m < M; ++m) total[h][m] =
          add_chunk(total[h][m], dot[h][m], zero, scale, x[m].sum[c], x[m].scale[c]);
    }
    piece += sizeof(Chunk) + kQuadBytes * chunk->quads;
  }
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    store_rows(y + m * w.rows, total[0][m], live);
    store_rows(y + m * w.rows + 8, total[1][m], live - 8);
  }
}

template <int Bits>
void gemm_bits(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel,
               std::byte* scratch) {
  const uint8_t* block = w.data + panel * w.panel_bytes;
  std::byte* to = scratch;
  int64_t cols = 0, chunks = 0, done = 0;  // of the piece; chunks before it
  const auto multiply = [&] {
    const int64_t stride = prepared_bytes(w), live = w.rows - panel * kRows;
    for_pieces<4, 2, 1>(m, [&]<int M>(int64_t first) {
      multiply_piece<M>(w, scratch, done, chunks, x + first * stride,
                        y + first * w.rows + panel * kRows, live);
    });
    to = scratch;
    done += chunks;
    cols = chunks = 0;
  };
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols) {
      const int64_t n = min64(w.chunk_cols, b.padded - c);
      if (cols + n > kPieceCols) multiply();
      unpack_chunk<Bits>(w, block + b.codes_at(c), block + b.grid, n / 4, to);
      to += static_cast<int64_t>(sizeof(Chunk)) + kQuadBytes * (n / 4);
      cols += n;
      ++chunks;
    }
  }
  multiply();
}

}  // namespace

int64_t avx2::gemm_block_bytes(const PanelView& w) { return 16 * prepared_bytes(w); }

void avx2::prepare_gemm_block(const PanelView& w, const float* x, int64_t rows, std::byte* out) {
  for (int64_t i = 0; i < rows; ++i) prepare_pairs(w, x + i * w.cols, out + i * prepared_bytes(w));
}

// A chunk has the columns of one step at least, so a piece has at most kPieceCols / step.
int64_t avx2::gemm_scratch_bytes(const PanelView& w) {
  return kPieceCols / padded_cols(w.bits, 1) * static_cast<int64_t>(sizeof(Chunk)) +
         kQuadBytes * (kPieceCols / 4);
}

void avx2::gemm(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte* scratch) {
  with_bits(w.bits, [&]<int Bits>() {
    for (int64_t panel = panel0; panel < panel1; ++panel)
      gemm_bits<Bits>(w, x, m, y, panel, scratch);
  });
}

}  // namespace omq::cpu
