// The asymmetric grid of learnable weight clipping for one group (paper Eq. 2; spec omniquant §2.3,
// §2.6), for host and device:
//
//   h = (γ·hi − β·lo) / (2ᵇ−1),  z = ⌊−β·lo / h⌉,  γ = σ(u), β = σ(l)
//
// h is kept within [1e-5, 1e4], and passes no gradient where it had to be; none goes through z.
#pragma once

#include "tensor/elementwise.h"
#include "tensor/packed.h"

namespace omq {

inline constexpr double kScaleFloor = 1e-5, kScaleCeiling = 1e4, kZeroLimit = 1e4;

template <class T> struct LwcGrid {
  T gamma, beta;  // σ(u), σ(l)
  T scale, zero;
  bool free_scale;  // not clamped
};

// include_zero: zero points are codes (GroupSpec::include_zero).
template <class T> OMQ_HD LwcGrid<T> lwc_grid(T u, T l, T hi, T lo, T levels, bool include_zero) {
  LwcGrid<T> g;
  g.gamma = fn::Sigmoid{}.fwd(u);
  g.beta = fn::Sigmoid{}.fwd(l);
  const T bottom = g.beta * lo, h = (g.gamma * hi - bottom) * (T(1) / levels);
  g.free_scale = h >= T(kScaleFloor) && h <= T(kScaleCeiling);
  g.scale = fn::Clamp{kScaleFloor, kScaleCeiling}.fwd(h);
  const T z = -bottom / g.scale;
  g.zero = include_zero ? fn::Clamp{0, static_cast<double>(levels)}.fwd(round_even(z))
                        : round_even(fn::Clamp{-kZeroLimit, kZeroLimit}.fwd(z));
  return g;
}

}  // namespace omq
