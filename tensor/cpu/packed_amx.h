// What the AMX kernels share (internal to tensor/): tiles of 16 rows × 64 bytes, panels unpacked to
// such tiles, and the multiplication of tiles of x with those of two panels.
//
// Both sides lie in tiles that follow each other, so that a chunk is one stream of each, from the
// L2 cache. A few panels are unpacked together, and a block of x meets them all before the next
// block. The sums of a chunk leave their tiles through memory and are scaled and added in F32 while
// the tiles multiply the next chunk, a little after each multiplication: measured faster than all
// of it after the chunk. (Prefetching by hand made it slower.)
#pragma once

#include "tensor/cpu/packed_avx512.h"

namespace omq::cpu {

// Defined in packed_amx_codes.cpp, for the table in packed_amx.cpp.
namespace amx {
void gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte* scratch);
int64_t gemm_codes_scratch_bytes(const PanelView& w);
int64_t codes_block_bytes(const PanelView& w);
void prepare_codes_block(const PanelView& w, const RowCodes* x, int64_t rows, std::byte* out);
}  // namespace amx

namespace {

constexpr int64_t kTileSize = 1024;  // bytes
constexpr int64_t kTileCols =
    64;  // bytes of a tile's row: columns of x that one multiplication takes
constexpr int64_t kTileRows = 16;  // rows of x in a tile, and of w in a panel

OMQ_INLINE int64_t steps_of(int64_t cols) { return (cols + kTileCols - 1) / kTileCols; }

// The compiler knows neither what a tile instruction reads nor what it writes: values are kept on
// their side of this.
OMQ_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, unused[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kWholeTiles;

// All eight tiles whole, until they are released. Every thread has tiles of its own. (No
// destructor: unwinding would bring a symbol that the linker merges, see packed_isa.h.)
OMQ_INLINE void take_tiles() {
  _tile_loadconfig(&kWholeTiles);
  memory_barrier();
}
OMQ_INLINE void release_tiles() {
  memory_barrier();
  _tile_release();
}

// body(offset of the chunk in a group's columns, padded columns, first byte of the group in the
// panel, offset of its scales there) for every chunk of a panel, in order.
template <class Body> OMQ_INLINE void for_each_stored_chunk(const PanelView& w, const Body& body) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t cols = padded_cols(w.bits, cols_of(w, g));
    for (int64_t c = 0; c < cols; c += w.chunk_cols)
      body(c, min64(w.chunk_cols, cols - c), g * w.block_bytes, cols * kRows * w.bits / 8);
  }
}

// Tiles of one unpacked panel: 16 quads each, the last of a chunk filled up with zeros.
OMQ_INLINE int64_t steps_of_panel(const PanelView& w) {
  int64_t steps = 0;
  for_each_stored_chunk(w,
                        [&](int64_t, int64_t cols, int64_t, int64_t) { steps += steps_of(cols); });
  return steps;
}

// ---- panels as tiles ----

constexpr int64_t kPanelsAtOnce = 8;  // unpacked together

// The grid of one chunk, 16 rows of w. Bytes of tiles are code − zero + rest, and there is a rest
// at 8 bits alone.
struct ChunkGrid {
  __m512 scale;
  __m512i rest, code_sum;  // Σ (code − zero)
};

struct Panel {
  uint8_t* tiles;
  ChunkGrid* grid;  // [chunks]
};

OMQ_INLINE int64_t unpacked_bytes(const PanelView& w) {
  return kTileSize * steps_of_panel(w) + static_cast<int64_t>(sizeof(ChunkGrid)) * w.chunks;
}
OMQ_INLINE Panel panel_at(const PanelView& w, std::byte* scratch, int64_t i) {
  std::byte* at = scratch + i * unpacked_bytes(w);
  return {reinterpret_cast<uint8_t*>(at),
          reinterpret_cast<ChunkGrid*>(at + kTileSize * steps_of_panel(w))};
}

// `cols` columns to tiles; gives Σ of their bytes, 16 rows. `less`: what is taken off the codes.
template <int Bits>
OMQ_INLINE __m512i unpack_chunk(const uint8_t* block, int64_t high, int64_t col, int64_t cols,
                                __m512i less, uint8_t* out) {
  constexpr int Q = kQuads<Bits>;
  const uint8_t* low = block + col / 8 * Block<Bits>::kLowBytes;
  const uint8_t* third_bits = block + high + 2 * col;
  __m512i sum = _mm512_setzero_si512();
  int64_t q = 0;
  for (; q < cols / 4; q += Q, low += 64, third_bits += 32) {
    __m512i quad[Q];
    unpack<Bits, false>(low, third_bits, quad);
    OMQ_UNROLL for (int s = 0; s < Q; ++s) {
      quad[s] = _mm512_sub_epi8(quad[s], less);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), quad[s]);
      _mm512_store_si512(out + 64 * (q + s), quad[s]);
    }
  }
  for (; q % kTileRows != 0; ++q) _mm512_store_si512(out + 64 * q, _mm512_setzero_si512());
  return sum;
}

template <int Bits> void unpack_panel(const PanelView& w, int64_t panel, const Panel& out) {
  const uint8_t* data = w.data + panel * w.panel_bytes;
  uint8_t* tiles = out.tiles;
  ChunkGrid* grid = out.grid;
  for_each_stored_chunk(w, [&](int64_t col, int64_t cols, int64_t group_at, int64_t grid_at) {
    const uint8_t* block = data + group_at;
    const __m512i zero = zeros_at(w, block + grid_at);
    const __m512i less = Bits == 8 ? _mm512_set1_epi8(-128)
                                   : _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x01010101));
    // The third bits begin where two bits a code end.
    const __m512i sum = unpack_chunk<Bits>(block, grid_at / Bits * 2, col, cols, less, tiles);
    grid->scale = load_f16(block + grid_at);
    grid->rest =
        Bits == 8 ? _mm512_sub_epi32(zero, _mm512_set1_epi32(128)) : _mm512_setzero_si512();
    // Surplus columns hold the zero point and add nothing.
    grid->code_sum = _mm512_sub_epi32(
        sum, _mm512_mullo_epi32(grid->rest, _mm512_set1_epi32(static_cast<int32_t>(cols))));
    tiles += steps_of(cols) * kTileSize;
    ++grid;
  });
}

// Two panels; of the last one of a matrix without a partner, itself twice.
struct Pair {
  Panel panel[2];
  int64_t first, count;
};

OMQ_INLINE int64_t pairs_scratch_bytes(const PanelView& w) {
  return kPanelsAtOnce * unpacked_bytes(w);
}

// body(pairs, their number) for panels panel0 … panel1 − 1, a few at a time.
template <class Body>
OMQ_INLINE void for_some_pairs(const PanelView& w, int64_t panel0, int64_t panel1,
                               std::byte* scratch, const Body& body) {
  for (int64_t panel = panel0; panel < panel1; panel += kPanelsAtOnce) {
    const int64_t count = min64(kPanelsAtOnce, panel1 - panel);
    with_bits(w.bits, [&]<int Bits>() {
      for (int64_t p = 0; p < count; ++p) unpack_panel<Bits>(w, panel + p, panel_at(w, scratch, p));
    });
    Pair pairs[kPanelsAtOnce / 2];
    for (int64_t p = 0; p < count; p += 2)
      pairs[p / 2] = {{panel_at(w, scratch, p), panel_at(w, scratch, min64(p + 1, count - 1))},
                      panel + p,
                      min64(2, count - p)};
    body(pairs, (count + 1) / 2);
  }
}

// ---- the multiplication ----

// Four tiles of sums as they leave: of x's first and second tiles with the first panel, then with
// the second. I32 [panel][tile of x][row of tile][row of w].
struct Sums {
  alignas(64) int32_t of[2][2][kTileRows][kRows];
};

template <class Work>
OMQ_INLINE void multiply_step(const int8_t* x, const uint8_t* w0, const uint8_t* w1,
                              const Work& work) {
  _tile_loadd(4, x, kTileCols);
  _tile_loadd(6, w0, kTileCols);
  _tile_dpbssd(0, 4, 6);
  work(0);
  _tile_loadd(5, x + kTileSize, kTileCols);
  _tile_dpbssd(1, 5, 6);
  work(1);
  _tile_loadd(7, w1, kTileCols);
  _tile_dpbssd(2, 4, 7);
  work(2);
  _tile_dpbssd(3, 5, 7);
  work(3);
}

// One chunk of a block of x, whose tiles come in pairs, with two panels. work(i) for i in [0, 4 ·
// BusySteps), BusySteps ≤ steps: what the vector units do meanwhile.
template <int BusySteps, class Work>
OMQ_INLINE void multiply_chunk(const int8_t* x, const uint8_t* w0, const uint8_t* w1, int64_t steps,
                               Sums& out, const Work& work) {
  memory_barrier();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  OMQ_UNROLL for (int step = 0; step < BusySteps; ++step) {
    multiply_step(
        x + 2 * kTileSize * step, w0 + kTileSize * step,
        w1 + kTileSize * step, [&](int i) __attribute__((always_inline)) {
          memory_barrier();
          work(4 * step + i);
          memory_barrier();
        });
  }
  for (int64_t step = BusySteps; step < steps; ++step)
    multiply_step(x + 2 * kTileSize * step, w0 + kTileSize * step, w1 + kTileSize * step,
                  [](int) {});
  _tile_stored(0, out.of[0][0], kTileCols);
  _tile_stored(1, out.of[0][1], kTileCols);
  _tile_stored(2, out.of[1][0], kTileCols);
  _tile_stored(3, out.of[1][1], kTileCols);
  memory_barrier();
}

// Multiplies one chunk, and meanwhile adds the sums of the chunk before to y.
template <int BusySteps, int Rows, class Share>
OMQ_INLINE void multiply_and_add(const int8_t* x, const uint8_t* w0, const uint8_t* w1,
                                 int64_t steps, Sums& out, const Share& before, float* y) {
  constexpr int kPart = Rows / (4 * BusySteps);
  multiply_chunk<BusySteps>(
      x, w0, w1, steps, out, [&](int part) __attribute__((always_inline)) {
        // (Rows are not written out: that was 20 KiB of code for each kind of sums.)
        for (int r = 0; r < kPart; ++r) before.add_row(kPart * part + r, y);
      });
}

// y [m, w.rows] of some pairs for blocks of x of Rows rows each. A Block(w, bytes) has kWideChunks
// (whether a chunk may have more than two steps), tiles(chunk), and share(pair, chunk, sums), one
// chunk's part of y, whose add_row(r, y) adds it to row r of the block, y F32 [Rows][2 · 16].
template <int Rows, class Block>
void multiply_pairs(const PanelView& w, const Pair* pairs, int64_t count, const std::byte* x,
                    int64_t block_bytes, int64_t m, float* out) {
  constexpr int kMostBusy = Rows / 4;
  alignas(64) float y[Rows * 2 * kRows];
  Sums sums[2] = {};
  auto before = Block(w, x).share(pairs[0], 0, sums[1]);  // nothing
  const Pair* pair_of_y = nullptr;
  int64_t row_of_y = 0, turn = 0;
  const auto write = [&] {
    for (int64_t r = 0; r < min64(Rows, m - row_of_y); ++r)
      for (int64_t p = 0; p < pair_of_y->count; ++p) {
        const int64_t row = (pair_of_y->first + p) * kRows;
        _mm512_mask_storeu_ps(out + (row_of_y + r) * w.rows + row, first(w.rows - row),
                              _mm512_load_ps(y + (2 * r + p) * kRows));
      }
  };
  for (int64_t row = 0; row < m; row += Rows, x += block_bytes) {
    const Block block(w, x);
    for (const Pair* pair = pairs; pair < pairs + count; ++pair) {
      int64_t chunk = 0, tile_at = 0;
      for_each_stored_chunk(w, [&](int64_t, int64_t cols, int64_t, int64_t) {
        const int64_t steps = steps_of(cols);
        const int8_t* x_tiles = block.tiles(chunk);
        const uint8_t *w0 = pair->panel[0].tiles + tile_at, *w1 = pair->panel[1].tiles + tile_at;
        Sums& to = sums[turn];
        if (Block::kWideChunks && steps >= kMostBusy)
          multiply_and_add<kMostBusy, Rows>(x_tiles, w0, w1, steps, to, before, y);
        else if (steps >= 2)
          multiply_and_add<2, Rows>(x_tiles, w0, w1, steps, to, before, y);
        else
          multiply_and_add<1, Rows>(x_tiles, w0, w1, steps, to, before, y);
        if (chunk == 0) {  // so y is whole
          if (pair_of_y) write();
          for (int i = 0; i < Rows * 2 * kRows; i += 16)
            _mm512_store_ps(y + i, _mm512_setzero_ps());
          pair_of_y = pair;
          row_of_y = row;
        }
        before = block.share(*pair, chunk, to);
        turn = 1 - turn;
        tile_at += steps * kTileSize;
        ++chunk;
      });
    }
  }
  for (int r = 0; r < Rows; ++r) before.add_row(r, y);
  write();
}

}  // namespace

}  // namespace omq::cpu
