// Prepared rows of the kernels whose dot product takes bytes (internal to tensor/): whole numbers
// of 15 bits as two planes of signed bytes, x ≈ scale · (256·hi + lo). Who uses them:
// packed_avx2.cpp, packed_avx512.cpp, packed_amx.cpp, packed_neon.cpp;
// packed_avx2_pairs.cpp keeps the numbers whole, in the room of both planes.
//
// Everything here is inlined or local to the file that includes it: see packed_isa.h.
#pragma once

#include "tensor/cpu/packed_panels.h"

namespace omq::cpu {

namespace {

// One row = scales, sums, hi plane, lo plane, each padded to 64 bytes.
struct Acts {
  const float* scale;     // [chunks]
  const int32_t* sum;     // [chunks] Σ of the whole numbers
  const int8_t *hi, *lo;  // [chunks, chunk_stride]
};

OMQ_INLINE int64_t plane_bytes(const PanelView& w) {
  return round_up(w.chunks * w.chunk_stride, 64);
}

OMQ_INLINE int64_t prepared_bytes(const PanelView& w) {
  return 2 * list_bytes(w) + 2 * plane_bytes(w);
}

OMQ_INLINE Acts acts_at(const PanelView& w, const std::byte* row) {
  const std::byte* planes = row + 2 * list_bytes(w);
  return {reinterpret_cast<const float*>(row),
          reinterpret_cast<const int32_t*>(row + list_bytes(w)),
          reinterpret_cast<const int8_t*>(planes),
          reinterpret_cast<const int8_t*>(planes + plane_bytes(w))};
}

// Where one chunk of a row is written: planes to the end of its slot, zeros past its columns.
struct ChunkOut {
  int64_t slot;
  float* scale;
  int32_t* sum;
  int8_t *hi, *lo;
};

// body(first column, columns, where) for every chunk of a row to be prepared.
template <class Body>
OMQ_INLINE void for_each_chunk_out(const PanelView& w, std::byte* row, const Body& body) {
  const Acts a = acts_at(w, row);
  for_each_chunk(w, [&](int64_t chunk, int64_t col, int64_t n) {
    body(col, n,
         ChunkOut{w.chunk_stride, const_cast<float*>(a.scale) + chunk,
                  const_cast<int32_t*>(a.sum) + chunk,
                  const_cast<int8_t*>(a.hi) + chunk * w.chunk_stride,
                  const_cast<int8_t*>(a.lo) + chunk * w.chunk_stride});
  });
}

// PackedIsa::prepare_codes_for_gemv: the whole numbers are the codes less their zero point.
OMQ_INLINE void prepare_codes_for_gemv(const PanelView& w, const RowCodes& x, std::byte* out) {
  for_each_chunk_out(w, out, [&](int64_t col, int64_t n, const ChunkOut& to) {
    const uint8_t* codes = x.codes + col;
    int32_t total = 0;
    for (int64_t i = 0; i < to.slot; ++i) {
      const int32_t whole = i < n ? codes[i] - x.zero : 0;
      to.hi[i] = static_cast<int8_t>((whole + 128) >> 8);
      to.lo[i] = static_cast<int8_t>(whole & 255);
      total += whole;
    }
    *to.scale = x.scale;
    *to.sum = total;
  });
}

}  // namespace

}  // namespace omq::cpu
