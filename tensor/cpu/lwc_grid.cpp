// The grid of learnable weight clipping and its gradient, a group an element.
#include "tensor/lwc_grid.h"

#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {

void lwc_grid(Tensor& scale, Tensor& zero, const Tensor& u, const Tensor& l, const Tensor& hi,
              const Tensor& lo, GroupSpec s) {
  visit_float("lwc_grid", u.dtype(), [&]<class T>() {
    const T *pu = u.data<T>(), *pl = l.data<T>(), *ph = hi.data<T>(), *po = lo.data<T>();
    T *h = scale.data<T>(), *z = zero.data<T>();
    const T levels = static_cast<T>(s.max_code());
    parallel_for(u.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const LwcGrid<T> g = omq::lwc_grid(pu[i], pl[i], ph[i], po[i], levels, s.include_zero);
        h[i] = g.scale;
        z[i] = g.zero;
      }
    });
  });
}

void lwc_grid_vjp(Tensor& du, Tensor& dl, Tensor& dhi, Tensor& dlo, const Tensor& u,
                  const Tensor& l, const Tensor& hi, const Tensor& lo, const Tensor& dscale,
                  GroupSpec s) {
  visit_float("lwc_grid_vjp", u.dtype(), [&]<class T>() {
    const T *pu = u.data<T>(), *pl = l.data<T>(), *ph = hi.data<T>(), *po = lo.data<T>(),
            *pd = dscale.data<T>();
    T *ou = du.data<T>(), *ol = dl.data<T>();
    T* oh = dhi.defined() ? dhi.data<T>() : nullptr;
    T* oo = dlo.defined() ? dlo.data<T>() : nullptr;
    const T levels = static_cast<T>(s.max_code());
    parallel_for(u.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const LwcGrid<T> g = omq::lwc_grid(pu[i], pl[i], ph[i], po[i], levels, s.include_zero);
        const T d = g.free_scale ? pd[i] * (T(1) / levels) : T(0);
        ou[i] = d * ph[i] * fn::Sigmoid{}.bwd(T(0), g.gamma);
        ol[i] = -d * po[i] * fn::Sigmoid{}.bwd(T(0), g.beta);
        if (oh) oh[i] = d * g.gamma;
        if (oo) oo[i] = -d * g.beta;
      }
    });
  });
}

}  // namespace omq::cpu
