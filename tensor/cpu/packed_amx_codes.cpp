// The product of codes with codes for many rows of x (PackedIsa::gemm_codes) on AMX's integer
// tiles.
//
// Two panels of weights meet 32 rows of x at once: four tiles of sums, each loaded tile used twice.
// A chunk may be as wide as the matrix (weights with one scale a row); it is taken in stretches of
// 1024 columns, all of x passing by each, so that the stretch of weights stays in the L1 cache. The
// sums wait in memory between stretches.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_amx.h"

namespace omq::cpu {

namespace {

constexpr int64_t kXRows = 2 * kTileRows;      // of x at once
constexpr int64_t kStretch = 16;               // tiles of a panel
constexpr int64_t kSums = kXRows * 2 * kRows;  // of 32 rows of x and two panels

// The four sums as they lie in memory between stretches: I32 [panel][row of x][row of w].
struct Ints {
  alignas(64) int32_t sums[2][kXRows][kRows];
};

struct Scratch {
  uint8_t* tiles[2];      // of the two panels
  __m512i* code_sums[2];  // [chunks]
  Ints* ints;             // [blocks of 32 rows]
  float* y;               // [blocks of 32 rows][32][2 · 16]
};

OMQ_INLINE int64_t blocks_of(int64_t m) { return (m + kXRows - 1) / kXRows; }

OMQ_INLINE Scratch divide(const PanelView& w, std::byte* at) {
  Scratch s;
  for (int p = 0; p < 2; ++p) {
    s.tiles[p] = reinterpret_cast<uint8_t*>(at);
    at += kTileSize * steps_of_panel(w);
    s.code_sums[p] = reinterpret_cast<__m512i*>(at);
    at += 64 * w.chunks;
  }
  s.ints = reinterpret_cast<Ints*>(at);
  s.y = reinterpret_cast<float*>(s.ints + blocks_of(kMaxGemmRows));
  return s;
}

void unpack_panel(const PanelView& w, int64_t panel, uint8_t* tiles, __m512i* sums) {
  const uint8_t* data = w.data + panel * w.panel_bytes;
  with_bits(w.bits, [&]<int Bits>() {
    for_each_stored_chunk(w, [&](int64_t col, int64_t cols, int64_t group_at, int64_t grid_at) {
      *sums++ = unpack_chunk<Bits, As::Codes>(data + group_at, grid_at / Bits * 2, col, cols,
                                              _mm512_setzero_si512(), tiles);
      tiles += steps_of(cols) * kTileSize;
    });
  });
}

// Adds one stretch to the four sums, or starts them.
OMQ_INLINE void multiply_stretch(const int8_t* x, int64_t row_bytes, const uint8_t* w0,
                                 const uint8_t* w1, int64_t steps, bool start, Ints& ints) {
  memory_barrier();
  if (start) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, ints.sums[0][0], kTileCols);
    _tile_loadd(1, ints.sums[0][kTileRows], kTileCols);
    _tile_loadd(2, ints.sums[1][0], kTileCols);
    _tile_loadd(3, ints.sums[1][kTileRows], kTileCols);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int8_t* columns = x + kTileCols * step;
    _tile_loadd(4, columns, row_bytes);
    _tile_loadd(6, w0 + kTileSize * step, kTileCols);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, columns + kTileRows * row_bytes, row_bytes);
    _tile_dpbsud(1, 5, 6);
    _tile_loadd(7, w1 + kTileSize * step, kTileCols);
    _tile_dpbsud(2, 4, 7);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, ints.sums[0][0], kTileCols);
  _tile_stored(1, ints.sums[0][kTileRows], kTileCols);
  _tile_stored(2, ints.sums[1][0], kTileCols);
  _tile_stored(3, ints.sums[1][kTileRows], kTileCols);
  memory_barrier();
}

// What turns a chunk's sums into its share of y; the surplus columns add nothing.
struct ChunkGrid {
  __m512 scale;
  __m512i zero, code_sum;  // Σ (code − zero)
};

OMQ_INLINE void add_scaled(const Ints& ints, const ChunkGrid (&grid)[2], const PanelView& w,
                           const std::byte* x, int64_t rows, int64_t chunk, float* y) {
  const int64_t row_bytes = prepared_codes_bytes(w);
  for (int64_t r = 0; r < rows; ++r) {
    const Bytes b = bytes_at(w, x + r * row_bytes);
    const __m512i x_sum = _mm512_set1_epi32(b.sum[chunk]), x_rest = _mm512_set1_epi32(b.rest);
    OMQ_UNROLL for (int p = 0; p < 2; ++p) {
      const __m512i off = _mm512_add_epi32(_mm512_mullo_epi32(grid[p].zero, x_sum),
                                           _mm512_mullo_epi32(grid[p].code_sum, x_rest));
      const __m512i dot = _mm512_sub_epi32(_mm512_load_si512(ints.sums[p][r]), off);
      float* to = y + (2 * r + p) * kRows;
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                          _mm512_mul_ps(grid[p].scale, _mm512_set1_ps(b.scale)),
                                          _mm512_load_ps(to)));
    }
  }
}

// y of two panels; of one when there is no second: `second` is then 0, its sums are not written.
void gemm_panels(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel,
                 int64_t second, const Scratch& s) {
  const int64_t row_bytes = prepared_codes_bytes(w), blocks = blocks_of(m);
  for (int64_t p = 0; p <= second; ++p) unpack_panel(w, panel + p, s.tiles[p], s.code_sums[p]);
  for (int64_t i = 0; i < blocks * kSums; i += 16) _mm512_store_ps(s.y + i, _mm512_setzero_ps());
  int64_t chunk = 0, tile = 0;
  for_each_stored_chunk(w, [&](int64_t, int64_t cols, int64_t group_at, int64_t grid_at) {
    ChunkGrid grid[2];
    OMQ_UNROLL for (int p = 0; p < 2; ++p) {
      const int64_t from = p == 0 ? 0 : second;
      const uint8_t* stored = w.data + (panel + from) * w.panel_bytes + group_at + grid_at;
      grid[p].scale = load_f16(stored);
      grid[p].zero = zeros_at(w, stored);
      grid[p].code_sum = _mm512_sub_epi32(
          s.code_sums[from][chunk],
          _mm512_mullo_epi32(grid[p].zero, _mm512_set1_epi32(static_cast<int32_t>(cols))));
    }
    const int64_t steps = steps_of(cols);
    for (int64_t done = 0; done < steps; done += kStretch) {
      const int64_t take = min64(kStretch, steps - done);
      for (int64_t b = 0; b < blocks; ++b) {
        const std::byte* rows = x + kXRows * b * row_bytes;
        const int8_t* columns = bytes_at(w, rows).x + chunk * w.chunk_stride + done * kTileCols;
        const int64_t at = (tile + done) * kTileSize;
        multiply_stretch(columns, row_bytes, s.tiles[0] + at, s.tiles[second] + at, take, done == 0,
                         s.ints[b]);
        if (done + take == steps)
          add_scaled(s.ints[b], grid, w, rows, min64(kXRows, m - kXRows * b), chunk,
                     s.y + b * kSums);
      }
    }
    tile += steps;
    ++chunk;
  });
  for (int64_t r = 0; r < m; ++r)
    for (int64_t p = 0; p <= second; ++p) {
      const int64_t row = (panel + p) * kRows;
      _mm512_mask_storeu_ps(y + r * w.rows + row, first(w.rows - row),
                            _mm512_load_ps(s.y + (2 * r + p) * kRows));
    }
}

}  // namespace

int64_t amx::gemm_codes_scratch_bytes(const PanelView& w) {
  const int64_t blocks = blocks_of(kMaxGemmRows);
  return 2 * (kTileSize * steps_of_panel(w) + 64 * w.chunks) +
         blocks * (static_cast<int64_t>(sizeof(Ints)) + 4 * kSums);
}

void amx::gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                     int64_t panel1, std::byte* scratch) {
  take_tiles();
  const Scratch s = divide(w, scratch);
  for (int64_t panel = panel0; panel < panel1; panel += 2)
    gemm_panels(w, x, m, y, panel, panel + 1 < panel1 ? 1 : 0, s);
  release_tiles();
}

}  // namespace omq::cpu
