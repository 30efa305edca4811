// PackedInt: how low-bit weights lie in memory and in files ("panel16", kernels spec §2).
//
// A matrix W [rows, cols] is cut into panels of 16 rows, a panel into blocks of one group of
// columns (the last group of a row may be short). A panel is one sequential run of bytes: block 0,
// block 1, …; the file holds the panels in order.
//
//   block = codes of 16 rows × n columns, then 16 f16 scales, then (asymmetric only) 16 zero
//   points, a byte each
//
//   n is the group's column count rounded up to a multiple of `column_step(bits)`; the surplus
//   holds code = zero point. Rows past the end of the matrix hold code 0 with scale 0.   w = scale
//   · (code − zero)
//
//   codes, by width; r = row in the panel (0…15), byte index within one 64-byte vector is 4r + j, j
//   = 0…3:
//     8 bits  vector v: columns 4v + j
//     4 bits  vector v: columns 8v + j (low nibble), 8v + 4 + j (high nibble)
//     2 bits  vector v: columns 16v + 4s + j in bits 2s, 2s+1   (s = 0…3)
//     3 bits  three vectors hold 32 columns, eight quads of four, quad s being columns 4s + j:
//             vector i (0, 1, 2) has quads 2i and 2i + 1 in bits 0 – 2 and 3 – 5; bits 6 and 7 of
//             vectors 0 and 1 are the low two bits of quads 6 and 7, whose third bits are bits 6
//             and 7 of vector 2
//
//   so a 64-byte vector is 16 rows × 4 consecutive columns once unpacked: the operand order of
//   VNNI's dot product. Most codes come out of theirs with one shift and one mask.
//
// Zero points are whole numbers in [0, 2ᵇ−1]: a byte holds them (2.375 bits a weight at 2 bits in
// groups of 64; two bytes would make it 2.5). Symmetric matrices store none: their zero is 2ᵇ⁻¹.
#pragma once

#include <cstdint>

#include "tensor/tensor.h"

namespace omq {

inline constexpr int64_t kPanelRows = 16;
// Up to so many rows of activations a GPU reads packed and 16-bit weights as they are stored; more
// rows meet them in F16.
inline constexpr int64_t kFewRows = 16;

// Quantisation grid of a weight matrix: what the codes mean. group_size 0 = one group per row.
struct GroupSpec {
  int bits = 4;              // 2…8
  int64_t group_size = 0;    // columns that share a scale; 0 = the whole row
  bool symmetric = false;    // zero fixed at 2ᵇ⁻¹
  bool include_zero = true;  // ranges are widened to hold 0, so that zero points are codes; false:
                             // as the official code
  bool end_codes_learn = false;  // straight-through gradient also where a code stands exactly on 0
                                 // or 2ᵇ−1 (spec omniquant §2.6, an old clamp); clip factors learn
                                 // worse so, free grids need it
  bool zero_learns = false;  // gradient to the zero point too: −h for each clamped code
  int64_t group_cols(int64_t cols) const { return group_size > 0 ? group_size : cols; }
  int64_t groups(int64_t cols) const { return (cols + group_cols(cols) - 1) / group_cols(cols); }
  int max_code() const { return (1 << bits) - 1; }
  bool operator==(const GroupSpec&) const = default;
};

struct PackedInt {
  Tensor data;  // U8 [panels, panel_bytes]
  int64_t rows = 0, cols = 0;
  GroupSpec spec;  // spec.bits is the stored width: 2, 3, 4 or 8

  int64_t panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  int64_t groups() const { return spec.groups(cols); }
  // Columns of group g before padding.
  int64_t group_columns(int64_t g) const {
    const int64_t full = spec.group_cols(cols), left = cols - g * full;
    return left < full ? left : full;
  }
  // Columns must be padded to a multiple of this.
  static int64_t column_step(int bits) {
    return bits == 8 ? 4 : bits == 4 ? 8 : bits == 3 ? 32 : 16;
  }
  static int64_t padded_columns(int64_t n, int bits) {
    const int64_t s = column_step(bits);
    return (n + s - 1) / s * s;
  }
  static int64_t code_bytes(int64_t n, int bits) {  // of one block with n columns
    return kPanelRows * padded_columns(n, bits) * bits / 8;
  }
  int64_t grid_bytes() const { return kPanelRows * (spec.symmetric ? 2 : 3); }
  int64_t block_bytes(int64_t g) const {
    return code_bytes(group_columns(g), spec.bits) + grid_bytes();
  }
  // Every block but the last has the same size, so block g starts at g · block_bytes(0).
  int64_t panel_bytes() const {
    return (groups() - 1) * block_bytes(0) + block_bytes(groups() - 1);
  }
  int64_t nbytes() const { return panels() * panel_bytes(); }
};

// Codes of 5, 6 and 7 bits are stored as 8.
inline int stored_bits(int bits) { return bits > 4 ? 8 : bits; }

// The form in which codes of spec s are stored: where the width grows, the zero points are written
// out.
inline GroupSpec stored_spec(GroupSpec s) {
  const int bits = stored_bits(s.bits);
  s.symmetric = s.symmetric && bits == s.bits;
  s.bits = bits;
  return s;
}

// Packs codes U8 [rows, cols] with grids scale and zero F32 [rows, groups] (zero ignored when
// symmetric). Scales must already be f16 values and zeros whole numbers in the code range: packing
// never rounds. CPU only. Throws Error when a code, scale or zero does not fit.
PackedInt pack_codes(const Tensor& codes, const Tensor& scale, const Tensor& zero, GroupSpec spec);

struct Unpacked {
  Tensor codes;        // U8 [rows, cols]
  Tensor scale, zero;  // F32 [rows, groups]
};
// The inverse, exactly. CPU only.
Unpacked unpack_codes(const PackedInt& w);

}  // namespace omq
