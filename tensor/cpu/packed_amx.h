// The words of the AMX kernels (internal to tensor/): tiles of 16 rows × 64 bytes. See
// packed_amx.cpp.
#pragma once

#include "tensor/cpu/packed_avx512.h"

namespace omq::cpu {

// Defined in packed_amx_codes.cpp, for the table in packed_amx.cpp.
namespace amx {
void gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte* scratch);
int64_t gemm_codes_scratch_bytes(const PanelView& w);
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

// How codes become the bytes of tiles.
enum class As { Codes, LessZero, Less128 };

// One chunk to tiles; gives Σ of its bytes, 16 rows. `zero`: the rows' zero points.
template <int Bits, As Form>
OMQ_INLINE __m512i unpack_chunk(const uint8_t* block, int64_t high, int64_t col, int64_t cols,
                                __m512i zero, uint8_t* out) {
  constexpr int Q = kQuads<Bits>;
  const uint8_t* low = block + col / 8 * Block<Bits>::kLowBytes;
  const uint8_t* third_bits = block + high + 2 * col;
  const __m512i less = Form == As::Less128
                           ? _mm512_set1_epi8(-128)
                           : _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x01010101));
  __m512i sum = _mm512_setzero_si512();
  int64_t q = 0;
  for (; q < cols / 4; q += Q, low += 64, third_bits += 32) {
    __m512i quad[Q];
    unpack<Bits, false>(low, third_bits, quad);
    OMQ_UNROLL for (int s = 0; s < Q; ++s) {
      if constexpr (Form == As::Codes)
        sum = _mm512_dpbusd_epi32(sum, quad[s], _mm512_set1_epi8(1));
      else
        quad[s] = _mm512_sub_epi8(quad[s], less);
      _mm512_store_si512(out + 64 * (q + s), quad[s]);
    }
  }
  for (; q % kTileRows != 0; ++q) _mm512_store_si512(out + 64 * q, _mm512_setzero_si512());
  return sum;
}

}  // namespace

}  // namespace omq::cpu
