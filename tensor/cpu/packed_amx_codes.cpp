// The product of codes with codes for many rows of x (PackedIsa::gemm_codes) on AMX's integer
// tiles.
//
// Two panels of weights meet 32 rows of x at once: four tiles of sums, each loaded tile used twice.
// A chunk may be as wide as the matrix (weights with one scale a row); between its pieces its sums
// wait in memory.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_amx.h"

namespace omq::cpu {

namespace {

constexpr int64_t kXRows = kCodesBlockRows;
constexpr int64_t kXTiles = kXRows / kTileRows;

// ---- 32 rows of x ----

// A row is scale · (byte − rest), as in prepare_codes: scales F32 [32], rests I32 [32], the sums of
// the chunks' bytes I32 [chunks, 32], then for each chunk and 64 columns of it the tiles of both
// halves.
struct XBlock {
  const float* scale;
  const int32_t *rest, *sum;
  const int8_t* tiles;
};

OMQ_INLINE int64_t x_chunk_bytes(const PanelView& w) {
  return kXTiles * kTileSize * steps_of(w.chunk_stride);
}

OMQ_INLINE XBlock x_block_at(const PanelView& w, const std::byte* block) {
  const auto* words = reinterpret_cast<const int32_t*>(block);
  return {reinterpret_cast<const float*>(block), words + kXRows, words + 2 * kXRows,
          reinterpret_cast<const int8_t*>(words + (2 + w.chunks) * kXRows)};
}

void prepare_row(const PanelView& w, const RowCodes& x, int64_t r, const XBlock& block) {
  const int32_t offset = x.bits < 8 ? x.zero : 128;
  const_cast<float*>(block.scale)[r] = x.scale;
  const_cast<int32_t*>(block.rest)[r] = x.zero - offset;
  const __m512i less = _mm512_set1_epi8(static_cast<char>(offset));
  const int64_t chunk_bytes = x_chunk_bytes(w);
  for_each_chunk(w, [&](int64_t chunk, int64_t first_col, int64_t n) {
    auto* to = const_cast<int8_t*>(block.tiles) + chunk * chunk_bytes + r / kTileRows * kTileSize +
               r % kTileRows * kTileCols;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t col = 0; col < w.chunk_stride; col += kTileCols, to += kXTiles * kTileSize) {
      const int64_t left = n - col;
      const __mmask64 live = left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
      const __m512i codes = _mm512_maskz_loadu_epi8(live, x.codes + first_col + col);
      const __m512i bytes = _mm512_maskz_sub_epi8(live, codes, less);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes);
      _mm512_store_si512(to, bytes);
    }
    const_cast<int32_t*>(block.sum)[kXRows * chunk + r] = _mm512_reduce_add_epi32(sum);
  });
}

// ---- y ----

// What the bytes of x and w leave out of a chunk: at most something of x, and little enough for a
// product of 16 bits, which costs less than one of 32; or anything.
enum class Rest { SmallOfX, Any };

// One chunk's part of y.
template <Rest kRest> struct CodesShare {
  const Sums* sums;
  const ChunkGrid* grid[2];
  const float* x_scale;
  const int32_t *x_rest, *x_sum;

  OMQ_INLINE void add_row(int r, float* y) const {
    const __m512 xs = _mm512_set1_ps(x_scale[r]);
    OMQ_UNROLL for (int p = 0; p < 2; ++p) {
      float* to = y + (2 * r + p) * kRows;
      __m512i dot = _mm512_load_si512(sums->of[p][r / kTileRows][r % kTileRows]);
      if constexpr (kRest == Rest::SmallOfX) {  // (the upper half of a lane meets 0)
        dot = _mm512_sub_epi32(
            dot, _mm512_madd_epi16(grid[p]->code_sum, _mm512_set1_epi32(x_rest[r] & 0xffff)));
      } else {
        dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(grid[p]->rest, _mm512_set1_epi32(x_sum[r])));
        dot = _mm512_sub_epi32(dot,
                               _mm512_mullo_epi32(grid[p]->code_sum, _mm512_set1_epi32(x_rest[r])));
      }
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                          _mm512_mul_ps(grid[p]->scale, xs), _mm512_load_ps(to)));
    }
  }
};

template <Rest kRest> struct CodesBlock {
  using Share = CodesShare<kRest>;
  static constexpr int64_t kXRows = kCodesBlockRows;
  static constexpr bool kSplits = true;
  // Sums that need not leave their tiles are worth more than tiles from the L1 cache.
  static constexpr int64_t kPieceSteps = 32, kPanelsAtOnce = 8, kPairsAtOnce = 1;
  static constexpr bool kAskAhead = true;
  XBlock x;
  int64_t chunk_bytes;
  OMQ_INLINE CodesBlock(const PanelView& w, const std::byte* block)
      : x(x_block_at(w, block)), chunk_bytes(x_chunk_bytes(w)) {}
  OMQ_INLINE const int8_t* tiles(int64_t chunk) const { return x.tiles + chunk * chunk_bytes; }
  OMQ_INLINE Share share(const Pair& p, int64_t chunk, const Sums& sums) const {
    return {&sums,
            {p.panel[0].grid + chunk, p.panel[1].grid + chunk},
            x.scale,
            x.rest,
            x.sum + kXRows * chunk};
  }
};

// Of x it has 8 bits and a sign; a chunk's sum of codes less their zero point must have 16.
bool rest_is_small(const PanelView& w) {
  return w.bits < 8 && w.chunk_stride * ((1 << w.bits) - 1) < 32768;
}

}  // namespace

int64_t amx::codes_block_bytes(const PanelView& w) {
  return (2 + w.chunks) * kXRows * 4 + w.chunks * x_chunk_bytes(w);
}

void amx::prepare_codes_block(const PanelView& w, const RowCodes* x, int64_t rows, std::byte* out) {
  const XBlock block = x_block_at(w, out);
  for (int64_t r = 0; r < rows; ++r) prepare_row(w, x[r], r, block);
  for (int64_t r = rows; r < kXRows; ++r) prepare_row(w, x[0], r, block);  // sums that nobody reads
}

int64_t amx::gemm_codes_scratch_bytes(const PanelView& w) {
  return Multiplication<CodesBlock<Rest::Any>>::scratch_bytes(w);
}

void amx::gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                     int64_t panel1, std::byte* scratch) {
  take_tiles();
  const auto run = rest_is_small(w) ? Multiplication<CodesBlock<Rest::SmallOfX>>::run
                                    : Multiplication<CodesBlock<Rest::Any>>::run;
  run(w, x, codes_block_bytes(w), m, y, panel0, panel1, scratch);
  release_tiles();
}

}  // namespace omq::cpu
