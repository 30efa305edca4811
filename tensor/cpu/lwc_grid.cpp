// The grid of learnable weight clipping and its gradient, a group an element.
#include "tensor/lwc_grid.h"

#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {

namespace {

constexpr int64_t kBlock = 64;  // groups whose grids are formed together: a loop that vectorises

template <class T> struct Grids {
  T gamma[kBlock], beta[kBlock], scale[kBlock], zero[kBlock], free_scale[kBlock];  // free: 1 or 0
};

// The grids of n groups. (kIncludeZero: a branch in the loop would keep it from being vectorised.)
template <bool kIncludeZero, class T>
void grids(const T* u, const T* l, const T* hi, const T* lo, int64_t n, T levels, Grids<T>& out) {
  Grids<T> g;  // of which the compiler knows that nothing else points there
  for (int64_t i = 0; i < n; ++i) {
    const LwcGrid<T> one = omq::lwc_grid(u[i], l[i], hi[i], lo[i], levels, kIncludeZero);
    g.gamma[i] = one.gamma;
    g.beta[i] = one.beta;
    g.scale[i] = one.scale;
    g.zero[i] = one.zero;
    g.free_scale[i] = one.free_scale ? T(1) : T(0);
  }
  out = g;
}

// body(first group, groups, their grids), in parallel.
template <class T, class Body>
void for_each_block(const Tensor& u, const Tensor& l, const Tensor& hi, const Tensor& lo,
                    const GroupSpec& s, const Body& body) {
  const T *pu = u.data<T>(), *pl = l.data<T>(), *ph = hi.data<T>(), *po = lo.data<T>();
  const T levels = static_cast<T>(s.max_code());
  parallel_for(u.numel(), kGrain, [&](int64_t begin, int64_t end) {
    Grids<T> g;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = std::min(kBlock, end - at);
      (s.include_zero ? grids<true, T> : grids<false, T>)(pu + at, pl + at, ph + at, po + at, n,
                                                          levels, g);
      body(at, n, g);
    }
  });
}

}  // namespace

void lwc_grid(Tensor& scale, Tensor& zero, const Tensor& u, const Tensor& l, const Tensor& hi,
              const Tensor& lo, GroupSpec s) {
  visit_float("lwc_grid", u.dtype(), [&]<class T>() {
    T *h = scale.data<T>(), *z = zero.data<T>();
    for_each_block<T>(u, l, hi, lo, s, [=](int64_t at, int64_t n, const Grids<T>& g) {
      std::copy_n(g.scale, n, h + at);
      std::copy_n(g.zero, n, z + at);
    });
  });
}

void lwc_grid_vjp(Tensor& du, Tensor& dl, Tensor& dhi, Tensor& dlo, const Tensor& u,
                  const Tensor& l, const Tensor& hi, const Tensor& lo, const Tensor& dscale,
                  GroupSpec s) {
  visit_float("lwc_grid_vjp", u.dtype(), [&]<class T>() {
    const T *ph = hi.data<T>(), *po = lo.data<T>(), *pd = dscale.data<T>();
    T *ou = du.data<T>(), *ol = dl.data<T>();
    T* oh = dhi.defined() ? dhi.data<T>() : nullptr;
    T* oo = dlo.defined() ? dlo.data<T>() : nullptr;
    const T step = T(1) / static_cast<T>(s.max_code());
    for_each_block<T>(u, l, hi, lo, s, [=](int64_t at, int64_t n, const Grids<T>& g) {
      T d[kBlock];
      for (int64_t i = 0; i < n; ++i) d[i] = g.free_scale[i] != T(0) ? pd[at + i] * step : T(0);
      for (int64_t i = 0; i < n; ++i)
        ou[at + i] = d[i] * ph[at + i] * fn::Sigmoid{}.bwd(T(0), g.gamma[i]);
      for (int64_t i = 0; i < n; ++i)
        ol[at + i] = -d[i] * po[at + i] * fn::Sigmoid{}.bwd(T(0), g.beta[i]);
      if (oh)
        for (int64_t i = 0; i < n; ++i) oh[at + i] = d[i] * g.gamma[i];
      if (oo)
        for (int64_t i = 0; i < n; ++i) oo[at + i] = -d[i] * g.beta[i];
    });
  });
}

}  // namespace omq::cpu
