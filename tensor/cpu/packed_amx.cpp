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
// planes) leave their tiles and are scaled and added in F32. That is half as much work for the
// vector units as the multiplications are for the tiles; the sums of one block of x are scaled
// while the tiles multiply the next.
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
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;  // leaf 7, EDX
  unsigned a = 0, b = 0, c = 0, d = 0;
  return avx512::runs_here() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) &&
         (d & kInt8) && tiles_permitted();
}

// ---- 16 rows of x ----

// For each chunk a scale F32 [16] and a sum I32 [16]; then for each chunk and 64 columns of it a
// tile of the high plane and one of the low; behind them room for one row as prepare gives it.
struct XBlock {
  const float* scale;
  const int32_t* sum;
  const int8_t* tiles;
};

OMQ_INLINE int64_t x_steps(const PanelView& w) { return w.chunks * steps_of(w.chunk_stride); }
OMQ_INLINE int64_t x_tiles_at(const PanelView& w) { return 128 * w.chunks; }
OMQ_INLINE int64_t x_row_at(const PanelView& w) {
  return x_tiles_at(w) + 2 * kTileSize * x_steps(w);
}
OMQ_INLINE XBlock x_block_at(const PanelView& w, const std::byte* block) {
  return {reinterpret_cast<const float*>(block),
          reinterpret_cast<const int32_t*>(block + 64 * w.chunks),
          reinterpret_cast<const int8_t*>(block + x_tiles_at(w))};
}

int64_t gemm_block_bytes(const PanelView& w) { return x_row_at(w) + prepared_bytes(w); }

void prepare_gemm_block(const PanelView& w, const float* x, int64_t rows, std::byte* out) {
  const XBlock block = x_block_at(w, out);
  auto* scale = const_cast<float*>(block.scale);
  auto* sum = const_cast<int32_t*>(block.sum);
  const int64_t steps = steps_of(w.chunk_stride);
  std::byte* prepared = out + x_row_at(w);
  for (int64_t r = 0; r < kTileRows; ++r) {
    if (r < rows) avx512::prepare(w, x + r * w.cols, prepared);
    const Acts a = acts_at(w, prepared);
    auto* to = const_cast<int8_t*>(block.tiles) + kTileCols * r;
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      scale[kTileRows * chunk + r] = r < rows ? a.scale[chunk] : 0.0f;
      sum[kTileRows * chunk + r] = r < rows ? a.sum[chunk] : 0;
      for (int64_t step = 0; step < steps; ++step, to += 2 * kTileSize) {
        const int64_t col = kTileCols * step, at = chunk * w.chunk_stride + col;
        const int64_t n = r < rows ? min64(kTileCols, w.chunk_stride - col) : 0;
        const __mmask64 live = n >= 64 ? ~0ull : (1ull << n) - 1;
        _mm512_store_si512(to, _mm512_maskz_loadu_epi8(live, a.hi + at));
        _mm512_store_si512(to + kTileSize, _mm512_maskz_loadu_epi8(live, a.lo + at));
      }
    }
  }
}

// ---- y ----

constexpr int64_t kBlocksAtOnce =
    8;  // of x: their sums, 16 KiB for two panels, stay in the L1 cache

// The sums of two panels as they leave their tiles: I32 [panel][plane][row of x][row of w].
struct Spilled {
  alignas(64) int32_t sums[2][2][kTileRows][kRows];
};

// Multiplies the tiles of one chunk of a block of x with those of two panels.
OMQ_INLINE void multiply_chunk(const int8_t* x, const uint8_t* w0, const uint8_t* w1, int64_t steps,
                               Spilled& out) {
  memory_barrier();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, x + 2 * kTileSize * step, kTileCols);
    _tile_loadd(6, w0 + kTileSize * step, kTileCols);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, x + 2 * kTileSize * step + kTileSize, kTileCols);
    _tile_dpbssd(1, 5, 6);
    _tile_loadd(7, w1 + kTileSize * step, kTileCols);
    _tile_dpbssd(2, 4, 7);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, out.sums[0][0], kTileCols);
  _tile_stored(1, out.sums[0][1], kTileCols);
  _tile_stored(2, out.sums[1][0], kTileCols);
  _tile_stored(3, out.sums[1][1], kTileCols);
  memory_barrier();
}

// What a chunk's sums are multiplied with, and for 8 bits what the bytes of its weights leave out:
// code − zero = byte − rest.
struct ChunkGrid {
  __m512 scale[2];
  __m512i rest[2];
};

// y of the block, F32 [row of x][2 · 16], plus its sums of one chunk. `next`: tiles of x that come
// soon.
template <bool kRest>
OMQ_INLINE void add_scaled(const Spilled& in, const ChunkGrid& grid, const float* x_scale,
                           const int32_t* x_sum, const int8_t* next, int64_t next_bytes, float* y) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    const __m512 xs = _mm512_set1_ps(x_scale[r]);
    OMQ_UNROLL for (int p = 0; p < 2; ++p) {
      float* to = y + (2 * r + p) * kRows;
      __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(in.sums[p][0][r]), 8),
                                     _mm512_load_si512(in.sums[p][1][r]));
      if constexpr (kRest)
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(grid.rest[p], _mm512_set1_epi32(x_sum[r])));
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(grid.scale[p], xs),
                                          _mm512_load_ps(to)));
    }
    for (int64_t at = 64 * r; at < next_bytes; at += 64 * kTileRows)
      _mm_prefetch(reinterpret_cast<const char*>(next + at), _MM_HINT_T0);
  }
}

// Two panels, unpacked. The last of a matrix may have no partner: it is its own then, and what the
// partner gives is not written.
struct Pair {
  const uint8_t* tiles[2];
  int64_t panel[2];
};

// y of a pair for up to kBlocksAtOnce blocks of x, summed in `sums`, F32 [16 · blocks][2 · 16].
// Chunk by chunk over all blocks: the weights of a chunk stay in the L1 cache, x comes from the L2.
template <bool kRest>
void multiply_blocks(const PanelView& w, const Pair& pair, const std::byte* x, int64_t blocks,
                     float* sums) {
  constexpr int64_t kSums = kTileRows * 2 * kRows;
  const int64_t block_bytes = gemm_block_bytes(w);
  const int64_t x_chunk_bytes = 2 * kTileSize * steps_of(w.chunk_stride);
  XBlock at[kBlocksAtOnce];
  for (int64_t b = 0; b < blocks; ++b) at[b] = x_block_at(w, x + b * block_bytes);
  for (int64_t i = 0; i < blocks * kSums; i += 16) _mm512_store_ps(sums + i, _mm512_setzero_ps());
  Spilled spilled[2];
  int64_t chunk = 0, tile_at = 0;
  for_each_stored_chunk(w, [&](int64_t, int64_t cols, int64_t group_at, int64_t grid_at) {
    ChunkGrid grid;
    OMQ_UNROLL for (int p = 0; p < 2; ++p) {
      const uint8_t* stored = w.data + pair.panel[p] * w.panel_bytes + group_at + grid_at;
      grid.scale[p] = load_f16(stored);
      grid.rest[p] = _mm512_sub_epi32(zeros_at(w, stored), _mm512_set1_epi32(128));
    }
    const auto add = [&](int64_t b) {
      const bool last = b + 2 >= blocks;  // of this chunk to be fetched
      const int8_t* next = at[last ? 0 : b + 2].tiles + (chunk + last) * x_chunk_bytes;
      add_scaled<kRest>(spilled[b % 2], grid, at[b].scale + kTileRows * chunk,
                        at[b].sum + kTileRows * chunk, next,
                        last && b + 1 == blocks ? 0 : x_chunk_bytes, sums + b * kSums);
    };
    for (int64_t b = 0; b < blocks; ++b) {
      multiply_chunk(at[b].tiles + chunk * x_chunk_bytes, pair.tiles[0] + tile_at,
                     pair.tiles[1] + tile_at, steps_of(cols), spilled[b % 2]);
      if (b > 0) add(b - 1);
    }
    add(blocks - 1);
    tile_at += steps_of(cols) * kTileSize;
    ++chunk;
  });
}

template <int Bits> void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  constexpr As kForm = Bits == 8 ? As::Less128 : As::LessZero;
  const uint8_t* data = w.data + panel * w.panel_bytes;
  for_each_stored_chunk(w, [&](int64_t col, int64_t cols, int64_t group_at, int64_t grid_at) {
    const uint8_t* block = data + group_at;
    // The third bits begin where two bits a code end.
    const int64_t high = grid_at / Bits * 2;
    unpack_chunk<Bits, kForm>(block, high, col, cols, zeros_at(w, block + grid_at), out);
    out += steps_of(cols) * kTileSize;
  });
}

int64_t gemm_scratch_bytes(const PanelView& w) {
  return 2 * kTileSize * steps_of_panel(w) + kBlocksAtOnce * kTileRows * 2 * kRows * 4;
}

void gemm(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1, std::byte* scratch) {
  take_tiles();
  const int64_t panel_bytes = kTileSize * steps_of_panel(w);
  auto* unpacked = reinterpret_cast<uint8_t*>(scratch);
  auto* sums = reinterpret_cast<float*>(scratch + 2 * panel_bytes);
  const auto multiply = w.bits == 8 ? multiply_blocks<true> : multiply_blocks<false>;
  for (int64_t panel = panel0; panel < panel1; panel += 2) {
    const int64_t count = min64(2, panel1 - panel);
    with_bits(w.bits, [&]<int Bits>() {
      for (int64_t p = 0; p < count; ++p)
        unpack_panel<Bits>(w, panel + p, unpacked + p * panel_bytes);
    });
    const Pair pair{{unpacked, unpacked + (count - 1) * panel_bytes}, {panel, panel + count - 1}};
    for (int64_t row = 0; row < m; row += kBlocksAtOnce * kTileRows) {
      const int64_t rows = min64(m - row, kBlocksAtOnce * kTileRows);
      multiply(w, pair, x + row / kTileRows * gemm_block_bytes(w),
               (rows + kTileRows - 1) / kTileRows, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t p = 0; p < count; ++p) {
          const int64_t out = (panel + p) * kRows;
          _mm512_mask_storeu_ps(y + (row + r) * w.rows + out, first(w.rows - out),
                                _mm512_load_ps(sums + (2 * r + p) * kRows));
        }
    }
  }
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
    .dequantize = avx512::dequantize,
    .dense_gemv = avx512::dense_gemv,
    .widen = avx512::widen,
};

}  // namespace omq::cpu
