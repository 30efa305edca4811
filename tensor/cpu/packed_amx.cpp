// The packed kernels for processors with AMX: few rows of x as on AVX-512, many rows by integer
// tiles. Table and contract: packed_isa.h; layout: tensor/packed.h.
//
// gemm: an unpacked vector of packed.h, 16 rows × 4 columns, is one row of a weight tile, so 16 of
// them (64 columns) are a tile as the multiplication wants it. Rows of x are the two planes of
// whole numbers that gemv reads (packed_avx512.cpp), so a tile of 16 rows × 64 columns of each: 16
// bits of activation survive, weights are exact, and y is gemv's bit for bit. BF16 tiles would take
// as many multiplications (twice as wide, one plane) and round both sides to 8 bits.
//
// Scales change from chunk to chunk (≤ 128 columns), so after each the four sums (two panels × two
// planes) leave their tiles and are scaled and added in F32: packed_amx.h.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_amx.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tensor/cpu/packed_planes.h"

namespace omq::cpu {

namespace {

// The kernel must be asked for the tiles' state before their first use (Linux, arch_prctl(2)); the
// answer holds for the process, whose signal stacks must then have room for that state.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool runs_here() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;  // leaf 7, EDX
  unsigned a = 0, b = 0, c = 0, d = 0;
  return avx512::runs_here() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) &&
         (d & kInt8) && (d & kBf16) && tiles_permitted();
}

// ---- 16 rows of x ----

// For each chunk a scale F32 [16] and a sum I32 [16]; then for each chunk and 64 columns of it a
// tile of the high plane and one of the low.
struct XBlock {
  const float* scale;
  const int32_t* sum;
  const int8_t* tiles;
};

OMQ_INLINE int64_t x_tiles_at(const PanelView& w) { return 128 * w.chunks; }
OMQ_INLINE XBlock x_block_at(const PanelView& w, const std::byte* block) {
  return {reinterpret_cast<const float*>(block),
          reinterpret_cast<const int32_t*>(block + 64 * w.chunks),
          reinterpret_cast<const int8_t*>(block + x_tiles_at(w))};
}

int64_t gemm_block_bytes(const PanelView& w) {
  return x_tiles_at(w) + 2 * kTileSize * w.chunks * steps_of(w.chunk_stride);
}

void prepare_gemm_block(const PanelView& w, const float* x, int64_t rows, std::byte* out) {
  const XBlock block = x_block_at(w, out);
  const int64_t steps = steps_of(w.chunk_stride), chunk_bytes = 2 * kTileSize * steps;
  for (int64_t r = 0; r < rows; ++r)
    for_each_chunk(w, [&](int64_t chunk, int64_t col, int64_t n) {
      auto* to = const_cast<int8_t*>(block.tiles) + chunk * chunk_bytes + kTileCols * r;
      const int64_t at = kTileRows * chunk + r;
      prepare_chunk(
          x + r * w.cols + col, n, kTileCols * steps, const_cast<float*>(block.scale) + at,
          const_cast<int32_t*>(block.sum) + at,
          [&](int64_t i, __m128i hi, __m128i lo) __attribute__((always_inline)) {
            int8_t* here = to + i / kTileCols * 2 * kTileSize + i % kTileCols;
            _mm_store_si128(reinterpret_cast<__m128i*>(here), hi);
            _mm_store_si128(reinterpret_cast<__m128i*>(here + kTileSize), lo);
          });
    });
  // Rows that are not there give sums that nobody reads.
  const int64_t bytes = w.chunks * chunk_bytes;
  for (int64_t r = rows; r < kTileRows; ++r) {
    for (int64_t at = kTileCols * r; at < bytes; at += kTileSize)
      _mm512_store_si512(const_cast<int8_t*>(block.tiles) + at, _mm512_setzero_si512());
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      const_cast<float*>(block.scale)[kTileRows * chunk + r] = 0.0f;
      const_cast<int32_t*>(block.sum)[kTileRows * chunk + r] = 0;
    }
  }
}

// ---- y ----

// One chunk's part of y: of its sums the first tile is the high plane's, the second the low one's.
template <bool kRest> struct FloatsShare {
  const Sums* sums;
  const ChunkGrid* grid[2];
  const float* x_scale;
  const int32_t* x_sum;

  OMQ_INLINE void add_row(int r, float* y) const {
    const __m512 xs = _mm512_set1_ps(x_scale[r]);
    OMQ_UNROLL for (int p = 0; p < 2; ++p) {
      float* to = y + (2 * r + p) * kRows;
      __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(sums->of[p][0][r]), 8),
                                     _mm512_load_si512(sums->of[p][1][r]));
      if constexpr (kRest)
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(grid[p]->rest, _mm512_set1_epi32(x_sum[r])));
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum),
                                          _mm512_mul_ps(grid[p]->scale, xs), _mm512_load_ps(to)));
    }
  }
};

template <bool kRest> struct FloatsBlock {
  using Share = FloatsShare<kRest>;
  static constexpr int64_t kXRows = kTileRows;
  static constexpr bool kSplits = false;  // a chunk has 128 columns at most
  // A piece of two pairs and of a block of x stay in the L1 cache.
  static constexpr int64_t kPieceSteps = 4, kPanelsAtOnce = 16, kPairsAtOnce = 2;
  static constexpr bool kAskAhead = false;
  XBlock x;
  int64_t chunk_bytes;
  OMQ_INLINE FloatsBlock(const PanelView& w, const std::byte* block)
      : x(x_block_at(w, block)), chunk_bytes(2 * kTileSize * steps_of(w.chunk_stride)) {}
  OMQ_INLINE const int8_t* tiles(int64_t chunk) const { return x.tiles + chunk * chunk_bytes; }
  OMQ_INLINE Share share(const Pair& p, int64_t chunk, const Sums& sums) const {
    return {&sums,
            {p.panel[0].grid + chunk, p.panel[1].grid + chunk},
            x.scale + kTileRows * chunk,
            x.sum + kTileRows * chunk};
  }
};

int64_t gemm_scratch_bytes(const PanelView& w) {
  return Multiplication<FloatsBlock<true>>::scratch_bytes(w);
}

void gemm(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1, std::byte* scratch) {
  take_tiles();
  const auto run = w.bits == 8 ? Multiplication<FloatsBlock<true>>::run
                               : Multiplication<FloatsBlock<false>>::run;
  run(w, x, gemm_block_bytes(w), m, y, panel0, panel1, scratch);
  release_tiles();
}

}  // namespace

const PackedIsa kAmxIsa = {
    .name = "amx",
    .runs_here = runs_here,
    .prepared_bytes = prepared_bytes,
    .prepare = avx512::prepare,
    .gemv = avx512::gemv,
    .gemv_for_many_rows = false,
    .gemm_block_bytes = gemm_block_bytes,
    .prepare_gemm_block = prepare_gemm_block,
    .gemm = gemm,
    .gemm_scratch_bytes = gemm_scratch_bytes,
    .prepare_codes_for_gemv = prepare_codes_for_gemv,
    .gemm_codes = amx::gemm_codes,
    .gemm_codes_scratch_bytes = amx::gemm_codes_scratch_bytes,
    .codes_block_bytes = amx::codes_block_bytes,
    .prepare_codes_block = amx::prepare_codes_block,
    .dequantize = avx512::dequantize,
    .dense_gemv = avx512::dense_gemv,
    .widen = avx512::widen,
    .attention_keys_bytes = amx::attention_keys_bytes,
    .prepare_attention_keys = amx::prepare_attention_keys,
    .attention_scratch_bytes = amx::attention_scratch_bytes,
    .attention_tile = amx::attention_tile,
};

}  // namespace omq::cpu
