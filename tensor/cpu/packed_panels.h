// What the vectorised packed kernels share: the walk over a panel's groups and chunks, and the form
// of prepared rows (internal to tensor/). Table and contract: packed_isa.h; layout:
// tensor/packed.h.
//
// Everything here is inlined or local to the file that includes it, because each is compiled for
// an instruction set of its own: see packed_isa.h.
#pragma once

#include "tensor/cpu/packed_isa.h"

#define OMQ_INLINE __attribute__((always_inline)) inline
#define OMQ_UNROLL _Pragma("GCC unroll 16")

namespace omq::cpu {

namespace {

constexpr int64_t kRows = 16;             // of a panel
constexpr float kActMax = 32512.0f;       // 256 · 127: a signed byte above a byte
constexpr int64_t kPrefetchBytes = 1536;  // ahead in each stream

OMQ_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
OMQ_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Codes are unpacked a step at a time: one 64-byte vector, or at 3 bits three.
template <int Bits> inline constexpr int kVectors = Bits == 3 ? 3 : 1;
template <int Bits> inline constexpr int kQuads = 8 * kVectors<Bits> / Bits;  // in a step
template <int Bits> inline constexpr int64_t kStepBytes = 64 * kVectors<Bits>;

// Columns of a group as it is stored: whole vectors.
OMQ_INLINE int64_t padded_cols(int bits, int64_t cols) {
  return round_up(cols, bits == 8 ? 4 : bits == 4 ? 8 : bits == 3 ? 32 : 16);
}
OMQ_INLINE int64_t cols_of(const PanelView& w, int64_t group) {
  return group + 1 < w.groups ? w.group_cols : w.last_cols;
}

// Where things are in one group of a panel.
template <int Bits> struct Block {
  int64_t cols, padded;
  int64_t grid;  // offset of the scales

  // Of the codes from column c on, which begins a step.
  OMQ_INLINE static int64_t codes_at(int64_t c) { return c * kRows * Bits / 8; }

  OMQ_INLINE Block(const PanelView& w, int64_t g)
      : cols(cols_of(w, g)), padded(padded_cols(Bits, cols)), grid(codes_at(padded)) {}
};

// body(chunk, first column, columns) for every chunk of a row of x.
template <class Body> OMQ_INLINE void for_each_chunk(const PanelView& w, const Body& body) {
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t cols = cols_of(w, g);
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk)
      body(chunk, g * w.group_cols + c, min64(w.chunk_cols, cols - c));
  }
}

// Bytes of a scale or a sum for each chunk of a row.
OMQ_INLINE int64_t list_bytes(const PanelView& w) { return round_up(w.chunks * 4, 64); }

// A row of prepare_codes (packed_isa.h).
struct Bytes {
  float scale;
  int32_t rest;
  const int32_t* sum;
  const int8_t* x;
};

OMQ_INLINE Bytes bytes_at(const PanelView& w, const std::byte* row) {
  Bytes b;
  __builtin_memcpy(&b.scale, row, 4);
  __builtin_memcpy(&b.rest, row + 4, 4);
  b.sum = reinterpret_cast<const int32_t*>(row + 64);
  b.x = reinterpret_cast<const int8_t*>(row + 64 + list_bytes(w));
  return b;
}

// Bytes of an unpacked panel (gemm_codes): for each chunk the sums of its codes, I32 [16], and for
// each plane 16 bytes a column.
OMQ_INLINE int64_t unpacked_panel_bytes(const PanelView& w, int64_t planes) {
  const int64_t cols =
      (w.groups - 1) * padded_cols(w.bits, w.group_cols) + padded_cols(w.bits, w.last_cols);
  return 64 * w.chunks + planes * kRows * cols;
}

// Calls body.operator()<Bits>() with the width of the codes.
template <class Body> OMQ_INLINE void with_bits(int bits, const Body& body) {
  switch (bits) {
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    default:
      return body.template operator()<8>();
  }
}

// Calls body.operator()<Stored>() with the type of dense weights.
template <class Body> OMQ_INLINE void with_stored(Stored type, const Body& body) {
  switch (type) {
    case Stored::F32:
      return body.template operator()<Stored::F32>();
    case Stored::BF16:
      return body.template operator()<Stored::BF16>();
    case Stored::F16:
      return body.template operator()<Stored::F16>();
  }
}

template <Stored T> inline constexpr int64_t kStoredBytes = T == Stored::F32 ? 4 : 2;

// Calls body.operator()<M>(first) for pieces of M of `count`: as many of the first of Sizes as fit,
// then of the next; the last is 1.
template <int... Sizes, class Body> OMQ_INLINE void for_pieces(int64_t count, const Body& body) {
  int64_t first = 0;
  const auto of_size = [&]<int M>() __attribute__((always_inline)) {
    for (; first + M <= count; first += M) body.template operator()<M>(first);
  };
  (of_size.template operator()<Sizes>(), ...);
}

// The walk of gemm_codes: a panel is unpacked once, unpack(panel), and stays in the first-level
// cache while all rows of x pass by, as many at once as Sizes say:
// multiply.operator()<M>(panel, x of the first, y of the first).
template <int... Sizes, class Unpack, class Multiply>
OMQ_INLINE void multiply_unpacked(const PanelView& w, const std::byte* x, int64_t m, float* y,
                                  int64_t panel0, int64_t panel1, const Unpack& unpack,
                                  const Multiply& multiply) {
  const int64_t row_bytes = prepared_codes_bytes(w);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    unpack(panel);
    for_pieces<Sizes...>(m, [&]<int M>(int64_t first) {
      multiply.template operator()<M>(panel, x + first * row_bytes, y + first * w.rows);
    });
  }
}

// The walk of dense_gemv: rows row0 … row1 − 1 of w against four rows of x at once, then against
// one: multiply.operator()<R, M>(x of the first, y of the first, row), where Single is R for one.
template <int Single, int Four, class Multiply>
OMQ_INLINE void multiply_dense(const DenseView& w, const float* x, int64_t m, float* y,
                               int64_t row0, int64_t row1, const Multiply& multiply) {
  for_pieces<4, 1>(m, [&]<int M>(int64_t first) {
    for_pieces<M == 1 ? Single : Four, 1>(row1 - row0, [&]<int R>(int64_t row) {
      multiply.template operator()<R, M>(x + first * w.cols, y + first * w.rows, row0 + row);
    });
  });
}

}  // namespace

}  // namespace omq::cpu
