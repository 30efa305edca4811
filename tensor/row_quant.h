// RowQuant: dynamic asymmetric quantisation of each row (the last dim: a token, or a token's head)
// on its own range, which is how activations and cached keys and values are quantised (spec
// omniquant §2, §5). The one definition of the row's grid, for simulation, integer kernels and
// cache alike.
//
//   code = clamp(⌊x/h⌉ + z, 0, 2ᵇ−1),   x̂ = (code − z)·h,   ⌊·⌉ half to even
#pragma once

#include "tensor/numeric.h"

namespace omq {

struct RowQuant {
  int bits = 8;              // 2…8
  bool include_zero = true;  // the range is widened to hold 0: z is a code, a constant row
                             // survives; false: as the official code, whose z may leave the codes
  bool end_codes_learn = false;  // as GroupSpec::end_codes_learn
  double clip = 1;  // share of the range that the codes span, (0, 1]; beyond it: the end codes
  int max_code() const { return (1 << bits) - 1; }
  bool operator==(const RowQuant&) const = default;
};

// What is taken from a code of so many bits to make it a signed byte.
OMQ_HD constexpr int signed_offset(int bits) { return bits == 8 ? 128 : 0; }

// Rows [..., N] as codes, each row on its own grid. What integer products and the key/value cache
// read.
struct QuantizedRows {
  Tensor codes;      // U8 [..., N]; paired: [..., ⌈N/2⌉], column 2i in the low half of byte i
  Tensor sums{};     // undefined, or I32 [...]: see as_signed()
  Tensor grid;       // F32 [..., 2]: h and z. h is NaN where a value of the row was not finite
  RowQuant spec;     // how they were made
  int64_t cols = 0;  // N
  bool paired = false;  // two codes a byte; at most 4 bits
  int64_t code_bytes() const { return paired ? (cols + 1) / 2 : cols; }  // of a row
  // Whether codes are I8, each less signed_offset(bits), with the sums of each row of them: what a
  // GPU's integer product of many rows multiplies. On the CPU they never are.
  bool as_signed() const { return sums.defined(); }
};

template <class T> struct RowGrid {
  T scale, zero;    // h > 0; z a whole number
  bool free_scale;  // h follows the range: gradients go through it
};

// hi, lo: largest and smallest element of the row.
template <class T> OMQ_HD inline RowGrid<T> row_grid(T hi, T lo, RowQuant s) {
  const T top = static_cast<T>((1 << s.bits) - 1);
  const T share = static_cast<T>(s.clip);  // placed so that no compiler fuses it with a sum
  if (s.include_zero) {
    hi = hi > T(0) ? hi : T(0);
    lo = lo < T(0) ? lo : T(0);
    const T raw = (hi - lo) * share / top;
    const T h = raw < T(1e-30) ? T(1e-30) : raw;  // NaN stays
    const T z = round_even(-lo * share / h);
    return {h, z < T(0) ? T(0) : z > top ? top : z, raw >= T(1e-30)};
  }
  const T raw = (hi - lo) * share / top;
  const T h = raw < T(1e-5) ? T(1e-5) : raw > T(1e4) ? T(1e4) : raw;
  const T z = -lo * share / h;
  return {h, round_even(z < T(-1e4) ? T(-1e4) : z > T(1e4) ? T(1e4) : z), raw == h};
}

template <class T> OMQ_HD inline T row_code(T x, RowGrid<T> g, T top) {
  const T t = round_even(x / g.scale) + g.zero;
  return t < T(0) ? T(0) : t > top ? top : t;
}

}  // namespace omq
