// How packed weights lie on a GPU: the codes of panel16 (tensor/packed.h) in the order in which a
// warp multiplies them, so that a lane loads 16 bytes at a time and every byte once.
//
// A panel of 16 rows is cut into units of U columns (128, 64 or 32, dividing the group), one warp's
// work at a time: U / 32 integer products m16n8k32 with the codes as the 16-row operand. Product s
// has columns 32 s … 32 s + 31 of the unit, so that a run of 32 columns of x may have a scale of
// its own; in which order they are called k = 0 … 31 is free as long as x is read in the same. Lane
// (r, q), r = lane / 4 and q = lane % 4, holds of rows r and r + 8 columns 8q … 8q + 7 of each
// product, in fours: product s takes fours 2s and 2s + 1. A four is a register of four bytes, and
// comes out of a word with one mask and at most one shift:
//
//   8 bits   a word is a four
//   4 bits   a word holds fours f and f + 2 of a row, in the low and the high halves of its bytes
//   2 bits   four fours of a row, f, f + 2, f + 4, f + 6, in bits 0, 1 to 6, 7; U = 64: 0 to 3; U =
//            32: two of row r, then two of row r + 8
//   3 bits   three words hold eight fours: word 0 fours 0 and 2 in bits 0 – 2 and 3 – 5, word 1
//            fours 1 and 3, word 2 fours 4 and 6; four 5 is bits 6, 7 of word 0 and bit 6 of word
//            2, four 7 bits 6, 7 of word 1 and bit 7 of word 2. U = 128: three words a row; 64:
//            fours 0 – 3 are row r's, 4 – 7 row r + 8's; 32: two words, the first row r's
//
// So both fours of a product stand at one place in their words, mostly, and can be multiplied where
// they are (below).
//
//   unit    a lane's words, in runs of 4, then 2, then 1, each run lane by lane
//   panel   its units;   matrix   its panels, then the grids, [panel][group][16] of GridWord
//
// Behind the grids stands room of a unit's bytes: two units are read at a time, at the end of a
// panel of an odd number of them one too many.
//
// Columns past the end hold code 0 and meet x = 0.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "tensor/packed.h"

namespace omq::cuda {

// A row's grid in a group: scale as F16 in the low half, the zero point as a whole number in the
// high one.
using GridWord = uint32_t;
__device__ __forceinline__ GridWord grid_word(__half scale, int zero) {
  return __half_as_ushort(scale) | static_cast<uint32_t>(zero) << 16;
}
__device__ __forceinline__ float grid_scale(GridWord g) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(g)));
}
__device__ __forceinline__ int grid_zero(GridWord g) { return static_cast<int>(g >> 16); }

// The first column of lane (r, q)'s four number f, in its unit; f even: the next four stands
// behind.
constexpr __host__ __device__ int four_column(int q, int f) {
  return f / 2 * 32 + q * 8 + f % 2 * 4;
}

// A lane's words of a unit.
constexpr __host__ __device__ int unit_words(int bits, int unit) {
  return bits == 3 && unit == 32 ? 2 : unit * bits / 64;
}
// Where word i of a lane stands in the unit, in words.
constexpr __host__ __device__ int word_offset(int words, int i, int lane) {
  const int fours = words / 4 * 4, twos = fours + words % 4 / 2 * 2;
  if (i < fours) return i / 4 * 128 + lane * 4 + i % 4;
  if (i < twos) return fours * 32 + lane * 2 + (i - fours);
  return twos * 32 + lane;
}

struct PackedView {  // by value into kernels
  const uint8_t* codes = nullptr;
  const GridWord* grids = nullptr;
  int bits = 0, unit = 0;  // unit: U
  int panels = 0, units = 0, groups = 0, units_per_group = 1;
  int rows = 0, cols = 0;
  int64_t unit_bytes() const { return int64_t{128} * unit_words(bits, unit); }
};

// U for a matrix of these groups; 0: its groups do not fall into units.
inline int unit_of(const PackedInt& w) {
  const int64_t n = w.groups() == 1 ? w.cols : w.spec.group_cols(w.cols);
  if (n % 128 == 0) return 128;
  if (n % 64 == 0) return 64;
  return n % 32 == 0 || w.groups() == 1 ? 32 : 0;
}
// The layout of w, whose data may be undefined; data: the first byte, or null.
inline PackedView packed_view(const PackedInt& w, const uint8_t* data) {
  PackedView v;
  v.bits = w.spec.bits;
  v.unit = unit_of(w);
  v.panels = static_cast<int>(w.panels());
  v.units = static_cast<int>((w.cols + v.unit - 1) / v.unit);
  v.groups = static_cast<int>(w.groups());
  v.units_per_group = v.groups == 1 ? v.units : static_cast<int>(w.spec.group_size / v.unit);
  v.rows = static_cast<int>(w.rows);
  v.cols = static_cast<int>(w.cols);
  v.codes = data;
  v.grids = reinterpret_cast<const GridWord*>(data + v.panels * (v.units * v.unit_bytes()));
  return v;
}
inline int64_t packed_bytes(const PackedView& v) {
  return v.panels * (v.units * v.unit_bytes() + int64_t{v.groups} * kPanelRows * 4) +
         v.unit_bytes();
}

// ---- where a code stands ----

struct CodePlace {
  int word, bit;                  // bit 0 of the code, of column 0 of its four
  int third = -1, third_bit = 0;  // of 3 bits: another word's bit for bit 2; −1: beside the others
};
// Four number f of row r (half 0) or r + 8 (half 1) in a lane's words; column j of it is in byte j.
constexpr __host__ __device__ CodePlace code_place(int bits, int unit, int half, int f) {
  if (bits == 8) return {f * 2 + half, 0};
  if (unit == 32) return bits == 2 ? CodePlace{0, 2 * (f + 2 * half)} : CodePlace{half, f * bits};
  if (bits == 4) return {(f / 4 * 2 + f % 2) * 2 + half, f / 2 % 2 * 4};
  if (bits == 2)
    return unit == 64 ? CodePlace{half, f * 2} : CodePlace{f % 2 * 2 + half, f / 2 * 2};
  const int first = unit == 128 ? 3 * half : 0, n = unit == 128 ? f : f + 4 * half;
  if (n < 4) return {first + n % 2, n / 2 * 3};
  if (n % 2 == 0) return {first + 2, n / 2 % 2 * 3};
  return {first + n / 2 - 2, 6, first + 2, n / 2 + 4};
}

// The four as bytes, each code at bit `to` of its byte, which is no higher than where the words
// have it. Everything but the words is known to the compiler.
template <int kBits, int kUnit>
__device__ __forceinline__ uint32_t four_codes(const uint32_t (&w)[unit_words(kBits, kUnit)],
                                               int half, int f, int to = 0) {
  const CodePlace at = code_place(kBits, kUnit, half, f);
  if (kBits == 8) return w[at.word];
  constexpr uint32_t kMask = 0x01010101u * ((1u << kBits) - 1);
  if (kBits != 3 || at.third < 0) return (w[at.word] >> (at.bit - to)) & (kMask << to);
  return ((w[at.word] >> (6 - to)) & (0x03030303u << to)) |
         ((w[at.third] >> (at.third_bit - 2 - to)) & (0x04040404u << to));
}

// ---- codes that stay where they are ----
//
// Codes that are multiplied at bit b of their bytes give 2ᵇ times their sum, so that no four is
// shifted, but the sum's scale divided. Both fours of a product stand at one place, nearly always.

// The bit of a product's codes, in words of row r (half 0) or r + 8 (half 1).
constexpr __host__ __device__ int place_bit(int bits, int unit, int half, int product) {
  return code_place(bits, unit, half, 2 * product).bit;
}
constexpr int kHighestPlace = 6;

// ---- x ----
//
// A row of x meets codes as whole numbers of 15 bits, in units of its own: v = s · (256 hi + lo),
// two bytes in two of the eight columns of a product; so four rows fit one, a tile.

constexpr int kTileRows = 4;
constexpr int kPackedRows = 2 * kTileRows;  // of a launch of packed_gemv.cu, at most

// Byte of column c of a unit (all of a unit's bytes of one row stand together): for each 64 columns
// (U = 32: 32) the hi bytes of lanes q = 0 … 3, kRun each, then the lo bytes, which are `lo_after`
// behind.
template <int kUnit> struct PlanePlace {
  static constexpr int kRun = kUnit == 32 ? 8 : 16;
  static constexpr int lo_after = 4 * kRun;
  static __host__ __device__ __forceinline__ int hi(int c) {
    const int q = c % 32 / 8, i = c / 32 * 8 + c % 8;  // byte i of lane q's
    return i / kRun * (8 * kRun) + q * kRun + i % kRun;
  }
};

}  // namespace omq::cuda
