// What the AMX kernels share (internal to tensor/): tiles of 16 rows × 64 bytes, panels unpacked to
// such tiles, and the multiplication of tiles of x with those of two panels.
//
// Every multiplication of tiles needs a load of one, so tiles must come from caches near: the
// columns of a piece of some panels are unpacked, and meet those columns of all rows of x before
// the next ones. What y has got so far waits in the L2 cache meanwhile.
//
// The sums of a chunk leave their tiles through memory and are scaled and added in F32 while
// the tiles multiply the next chunk, a little after each multiplication: measured faster than all
// of it after the chunk.
#pragma once

#include "tensor/cpu/packed_avx512.h"

namespace omq::cpu {

// Defined in packed_amx_codes.cpp and packed_amx_attention.cpp, for the table in packed_amx.cpp.
namespace amx {
int64_t attention_keys_bytes(int64_t keys, int64_t d);
void prepare_attention_keys(const AttentionKeys& x, int64_t key0, int64_t key1, std::byte* out);
int64_t attention_scratch_bytes(int64_t keys, int64_t d);
void attention_tile(const AttentionTile& t, const AttentionKeys& x, const std::byte* keys,
                    std::byte* scratch);
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

// ---- panels as tiles ----

constexpr int64_t kMostPieceSteps = 32;

// A chunk's columns, or some of them when it is longer than a piece.
struct Part {
  int64_t chunk;
  int64_t group_at, grid_at;  // bytes: the group in its panel, its scales in the group
  int64_t col, cols;          // in the group, padded
  int64_t step, steps;        // in the chunk
  bool opens, closes;         // the chunk
};
// What is multiplied before the next columns: parts that follow each other.
struct Piece {
  Part part[kMostPieceSteps];
  int64_t parts, steps;
};

// body(piece) for all columns of a panel, in pieces of at most so many steps.
template <int64_t kPieceSteps, class Body>
OMQ_INLINE void for_each_piece(const PanelView& w, const Body& body) {
  Piece piece = {};
  const auto end = [&] {
    if (piece.parts > 0) body(piece);
    piece.parts = piece.steps = 0;
  };
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t group_cols = padded_cols(w.bits, cols_of(w, g));
    for (int64_t c = 0; c < group_cols; c += w.chunk_cols, ++chunk) {
      const int64_t cols = min64(w.chunk_cols, group_cols - c), steps = steps_of(cols);
      if (steps <= kPieceSteps && piece.steps + steps > kPieceSteps) end();
      for (int64_t step = 0, n = 0; step < steps; step += n) {
        n = min64(steps - step, kPieceSteps - piece.steps);
        piece.part[piece.parts++] = {chunk,
                                     g * w.block_bytes,
                                     group_cols * kRows * w.bits / 8,
                                     c + step * kTileCols,
                                     min64(n * kTileCols, cols - step * kTileCols),
                                     step,
                                     n,
                                     step == 0,
                                     step + n == steps};
        piece.steps += n;
        if (piece.steps == kPieceSteps) end();
      }
    }
  }
  end();
}

// The grid of one chunk, 16 rows of w. Bytes of tiles are code − zero + rest, and there is a rest
// at 8 bits alone.
struct ChunkGrid {
  __m512 scale;
  __m512i rest, code_sum;  // Σ (code − zero)
};

struct Panel {
  uint8_t* tiles;   // of a piece
  ChunkGrid* grid;  // [chunks]
};

template <int64_t kPieceSteps> OMQ_INLINE int64_t unpacked_bytes(const PanelView& w) {
  return kTileSize * kPieceSteps + static_cast<int64_t>(sizeof(ChunkGrid)) * w.chunks;
}
template <int64_t kPieceSteps>
OMQ_INLINE Panel panel_at(const PanelView& w, std::byte* scratch, int64_t i) {
  std::byte* at = scratch + i * unpacked_bytes<kPieceSteps>(w);
  return {reinterpret_cast<uint8_t*>(at),
          reinterpret_cast<ChunkGrid*>(at + kTileSize * kPieceSteps)};
}

// `cols` columns to tiles; gives Σ of their bytes, 16 rows. `less`: what is taken off the codes.
template <int Bits>
OMQ_INLINE __m512i unpack_columns(const uint8_t* step, int64_t cols, __m512i less, uint8_t* out) {
  constexpr int Q = kQuads<Bits>;
  __m512i sum = _mm512_setzero_si512();
  int64_t q = 0;
  for (; q < cols / 4; q += Q, step += kStepBytes<Bits>) {
    __m512i quad[Q];
    unpack<Bits, false>(step, quad);
    OMQ_UNROLL for (int s = 0; s < Q; ++s) {
      quad[s] = _mm512_sub_epi8(quad[s], less);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), quad[s]);
      _mm512_store_si512(out + 64 * (q + s), quad[s]);
    }
  }
  for (; q % kTileRows != 0; ++q) _mm512_store_si512(out + 64 * q, _mm512_setzero_si512());
  return sum;
}

template <int Bits>
void unpack_piece(const PanelView& w, int64_t panel, const Piece& piece, const Panel& out) {
  const uint8_t* data = w.data + panel * w.panel_bytes;
  uint8_t* tiles = out.tiles;
  for (const Part* part = piece.part; part < piece.part + piece.parts; ++part) {
    const uint8_t* block = data + part->group_at;
    const __m512i zero = zeros_at(w, block + part->grid_at);
    const __m512i less = Bits == 8 ? _mm512_set1_epi8(-128)
                                   : _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x01010101));
    const __m512i sum =
        unpack_columns<Bits>(block + Block<Bits>::codes_at(part->col), part->cols, less, tiles);
    ChunkGrid& grid = out.grid[part->chunk];
    if (part->opens) {
      grid.scale = load_f16(block + part->grid_at);
      grid.rest =
          Bits == 8 ? _mm512_sub_epi32(zero, _mm512_set1_epi32(128)) : _mm512_setzero_si512();
      grid.code_sum = _mm512_setzero_si512();
    }
    // Surplus columns hold the zero point and add nothing.
    grid.code_sum = _mm512_add_epi32(
        grid.code_sum,
        _mm512_sub_epi32(sum, _mm512_mullo_epi32(
                                  grid.rest, _mm512_set1_epi32(static_cast<int32_t>(part->cols)))));
    tiles += part->steps * kTileSize;
  }
}

// Two panels; of the last one of a matrix without a partner, itself twice.
struct Pair {
  Panel panel[2];
  int64_t first, count;
};

// ---- the multiplication ----

// Four tiles of sums as they leave: of x's first and second tiles with the first panel, then with
// the second. I32 [panel][tile of x][row of tile][row of w].
struct Sums {
  alignas(64) int32_t of[2][2][kTileRows][kRows];
};

// One step's part of four tiles of sums; what a step does besides is up to around(i), called after
// the i-th multiplication.
//
// A tile that is not needed any more is zeroed at once: a zeroed tile takes none of the physical
// registers that tiles are renamed to. When the core's other thread is busy, too few of these are
// left for loads to run ahead of multiplications: with all eight tiles live a multiplication then
// takes 37 cycles instead of 16, a load beside it as many again.
//
// kAskAhead: x comes from the L2 cache, and the next step's is asked for.
template <bool kAskAhead, class Around>
OMQ_INLINE void multiply_step(const int8_t* x, const uint8_t* w0, const uint8_t* w1,
                              const Around& around) {
  const auto ask = [x](int quarter) __attribute__((always_inline)) {
    if constexpr (kAskAhead)
      OMQ_UNROLL for (int line = 8 * quarter; line < 8 * quarter + 8; ++line)
          __builtin_prefetch(x + 2 * kTileSize + 64 * line);
  };
  _tile_loadd(4, x, kTileCols);
  _tile_loadd(6, w0, kTileCols);
  _tile_dpbssd(0, 4, 6);
  ask(0);
  around(0);
  _tile_loadd(5, x + kTileSize, kTileCols);
  _tile_dpbssd(1, 5, 6);
  _tile_zero(6);
  ask(1);
  around(1);
  _tile_loadd(7, w1, kTileCols);
  _tile_dpbssd(2, 4, 7);
  _tile_zero(4);
  ask(2);
  around(2);
  _tile_dpbssd(3, 5, 7);
  _tile_zero(5);
  _tile_zero(7);
  ask(3);
  around(3);
}

// The i-th tile of sums to its place; it is zero then.
OMQ_INLINE void store_sums(int i, Sums& to) {
  switch (i) {
    case 0:
      _tile_stored(0, to.of[0][0], kTileCols);
      _tile_zero(0);
      return;
    case 1:
      _tile_stored(1, to.of[0][1], kTileCols);
      _tile_zero(1);
      return;
    case 2:
      _tile_stored(2, to.of[1][0], kTileCols);
      _tile_zero(2);
      return;
    default:
      _tile_stored(3, to.of[1][1], kTileCols);
      _tile_zero(3);
      return;
  }
}

// One part of a block of x, whose tiles come in pairs, with two panels; all tiles are zero before
// and after. `from`: the chunk's sums so far, null when the part opens it. work(i) for i in [0, 4 ·
// BusySteps), BusySteps ≤ steps: what the vector units do meanwhile; it must not touch `to`.
template <int BusySteps, bool kAskAhead, class Work>
OMQ_INLINE void multiply_part(const int8_t* x, const uint8_t* w0, const uint8_t* w1, int64_t steps,
                              const Sums* from, Sums& to, const Work& work) {
  memory_barrier();
  if (from) {
    _tile_loadd(0, from->of[0][0], kTileCols);
    _tile_loadd(1, from->of[0][1], kTileCols);
    _tile_loadd(2, from->of[1][0], kTileCols);
    _tile_loadd(3, from->of[1][1], kTileCols);
  }
  const auto step = [&](int64_t at, const auto& around) __attribute__((always_inline)) {
    multiply_step<kAskAhead>(x + 2 * kTileSize * at, w0 + kTileSize * at, w1 + kTileSize * at,
                             around);
  };
  const auto busy = [&](int i) __attribute__((always_inline)) {
    memory_barrier();
    work(i);
    memory_barrier();
  };
  constexpr int kBusyBefore = BusySteps == 2 ? 1 : 0;  // steps with work that are not the last
  if constexpr (kBusyBefore == 1) step(0, busy);
  for (int64_t at = kBusyBefore; at < steps - 1; ++at) step(at, [](int) {});
  step(
      steps - 1, [&](int i) __attribute__((always_inline)) {
        store_sums(i, to);
        if constexpr (BusySteps > 0) busy(4 * kBusyBefore + i);
      });
  memory_barrier();
}

// Multiplies one part, and meanwhile adds the sums of a chunk before to y.
template <int BusySteps, int Rows, bool kAskAhead, class Share>
OMQ_INLINE void multiply_and_add(const int8_t* x, const uint8_t* w0, const uint8_t* w1,
                                 int64_t steps, const Sums* from, Sums& to, const Share& before,
                                 float* y) {
  constexpr int kRowsAtOnce = Rows / (4 * BusySteps);
  multiply_part<BusySteps, kAskAhead>(
      x, w0, w1, steps, from, to, [&](int i) __attribute__((always_inline)) {
        // (Rows are not written out: that was 20 KiB of code for each kind of sums.)
        for (int r = 0; r < kRowsAtOnce; ++r) before.add_row(kRowsAtOnce * i + r, y);
      });
}

// y [m, w.rows] of panels panel0 … panel1 − 1 for blocks of x of Block::kXRows rows each. A
// Block(w, bytes) has tiles(chunk), and share(pair, chunk, sums), one chunk's part of y, whose
// add_row(r, y) adds it to row r of the block, y F32 [kXRows][2 · 16]. kSplits: whether chunks may
// be longer than a piece; their sums are then kept as whole numbers until the chunk closes.
//
// Block::kPanelsAtOnce panels are unpacked together, Block::kPieceSteps · 64 columns at a time:
// these tiles and the sums of all rows of x with them lie in the L2 cache. Of these
// Block::kPairsAtOnce pairs meet a block of x before the next one does.
template <class Block> class Multiplication {
 public:
  static int64_t scratch_bytes(const PanelView& w) {
    return kPanelsAtOnce * unpacked_bytes<Block::kPieceSteps>(w) +
           kMostTiles * (kTileOfY + (Block::kSplits ? static_cast<int64_t>(sizeof(Sums)) : 0));
  }

  static void run(const PanelView& w, const std::byte* x, int64_t block_bytes, int64_t m, float* y,
                  int64_t panel0, int64_t panel1, std::byte* scratch) {
    Multiplication product(w, x, block_bytes, m, y, scratch);
    for (int64_t panel = panel0; panel < panel1; panel += kPanelsAtOnce)
      product.multiply_panels(panel, min64(kPanelsAtOnce, panel1 - panel));
    if (product.streams) _mm_sfence();  // before others are told that y is there
  }

 private:
  static constexpr bool kAsk = Block::kAskAhead;
  static constexpr int64_t kXRows = Block::kXRows, kPanelsAtOnce = Block::kPanelsAtOnce;
  static constexpr int64_t kTileOfY = kXRows * 2 * kRows * 4;  // bytes
  static constexpr int64_t kLargeY = 1024 * 1024;              // bytes
  static constexpr int64_t kMostTiles = kMaxGemmRows / kXRows * (kPanelsAtOnce / 2);

  // A closed chunk, to be scaled and added while the next part is multiplied; all are added before
  // their pairs end.
  struct Closed {
    typename Block::Share share;
    float* y = nullptr;  // null: there is none
    const Pair* pair;
    int64_t row;
    bool last;  // y is whole then
  };

  OMQ_INLINE Multiplication(const PanelView& view, const std::byte* x_blocks, int64_t x_block_bytes,
                            int64_t rows, float* out, std::byte* memory)
      : w(view), x(x_blocks), block_bytes(x_block_bytes), m(rows), y(out), scratch(memory) {
    tiles_of_y =
        reinterpret_cast<float*>(scratch + kPanelsAtOnce * unpacked_bytes<Block::kPieceSteps>(w));
    open_sums = reinterpret_cast<Sums*>(tiles_of_y + kMostTiles * kTileOfY / 4);
    // A y that no cache near would keep goes past them: its rows lie far apart, and a store waits
    // for each line that it must read first.
    streams = m * w.rows * 4 >= kLargeY && w.rows % kRows == 0 &&
              reinterpret_cast<uintptr_t>(y) % 64 == 0;
  }

  OMQ_INLINE Panel unpacked(int64_t i) const { return panel_at<Block::kPieceSteps>(w, scratch, i); }

  OMQ_INLINE void multiply_panels(int64_t panel, int64_t count) {
    Pair pairs[kPanelsAtOnce / 2];
    for (int64_t p = 0; p < count; p += 2)
      pairs[p / 2] = {
          {unpacked(p), unpacked(min64(p + 1, count - 1))}, panel + p, min64(2, count - p)};
    const int64_t pair_count = (count + 1) / 2;
    for_each_piece<Block::kPieceSteps>(w, [&](const Piece& piece) {
      with_bits(w.bits, [&]<int Bits>() {
        for (int64_t p = 0; p < count; ++p) unpack_piece<Bits>(w, panel + p, piece, unpacked(p));
      });
      for (int64_t pair = 0; pair < pair_count; pair += Block::kPairsAtOnce)
        for (int64_t row = 0; row < m; row += kXRows)
          for (int64_t p = pair; p < min64(pair + Block::kPairsAtOnce, pair_count); ++p)
            multiply_piece(piece, pairs[p], row, row / kXRows * (kPanelsAtOnce / 2) + p);
    });
    if (closed.y) {
      for (int r = 0; r < kXRows; ++r) closed.share.add_row(r, closed.y);
      finish();
    }
  }

  OMQ_INLINE void multiply_piece(const Piece& piece, const Pair& pair, int64_t row, int64_t tile) {
    const Block block(w, x + row / kXRows * block_bytes);
    float* y_tile = tiles_of_y + tile * (kTileOfY / 4);
    int64_t at = 0;
    for (const Part* part = piece.part; part < piece.part + piece.parts; ++part) {
      if (part->chunk == 0 && part->opens)
        for (int64_t i = 0; i < kTileOfY / 4; i += 16)
          _mm512_store_ps(y_tile + i, _mm512_setzero_ps());
      const int8_t* x_tiles = block.tiles(part->chunk) + 2 * kTileSize * part->step;
      const uint8_t *w0 = pair.panel[0].tiles + at, *w1 = pair.panel[1].tiles + at;
      // A chunk's last sums never lie where those of the chunk before are still read.
      Sums* const open = Block::kSplits ? &open_sums[tile] : nullptr;
      const Sums* const from = part->opens ? nullptr : open;
      Sums& to = part->closes ? closed_sums[turn] : *open;
      const typename Block::Share share = closed.share;
      float* const y_before = closed.y;
      if (!y_before)
        multiply_part<0, kAsk>(x_tiles, w0, w1, part->steps, from, to, [](int) {});
      else if (part->steps >= 2)
        multiply_and_add<2, kXRows, kAsk>(x_tiles, w0, w1, part->steps, from, to, share, y_before);
      else
        multiply_and_add<1, kXRows, kAsk>(x_tiles, w0, w1, part->steps, from, to, share, y_before);
      if (y_before) finish();
      if (part->closes) {
        closed = {block.share(pair, part->chunk, to), y_tile, &pair, row,
                  part->chunk + 1 == w.chunks};
        turn = 1 - turn;
      }
      at += part->steps * kTileSize;
    }
  }

  // After the closed chunk was added.
  OMQ_INLINE void finish() {
    if (closed.last)
      for (int64_t r = 0; r < min64(kXRows, m - closed.row); ++r)
        for (int64_t p = 0; p < closed.pair->count; ++p) {
          const int64_t row = (closed.pair->first + p) * kRows;
          float* const to = y + (closed.row + r) * w.rows + row;
          const __m512 sums = _mm512_load_ps(closed.y + (2 * r + p) * kRows);
          if (streams)
            _mm512_stream_ps(to, sums);
          else
            _mm512_mask_storeu_ps(to, first(w.rows - row), sums);
        }
    closed.y = nullptr;
  }

  const PanelView& w;
  const std::byte* x;
  int64_t block_bytes, m;
  float* y;
  std::byte* scratch;
  float* tiles_of_y;
  Sums* open_sums;
  bool streams;
  Sums closed_sums[2];
  int turn = 0;
  Closed closed = {};
};

}  // namespace

}  // namespace omq::cpu
