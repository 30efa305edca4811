// One AdamW step: decoupled weight decay, bias-corrected moments.
#include <cmath>

#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {

void adamw_tick(Tensor& clock, const Tensor& loss, AdamWStep s) {
  double* const c = clock.data<double>();
  if (loss.defined())
    visit_float("adamw_tick", loss.dtype(), [&]<class T>() {
      if (!std::isfinite(*loss.data<T>())) c[1] = c[2] = HUGE_VAL;
    });
  if (std::isinf(c[1])) return;
  c[0] += 1;
  c[1] = 1 - std::pow(s.beta1, c[0]);
  c[2] = 1 - std::pow(s.beta2, c[0]);
  c[3] = s.rate.share(c[0]);
}

void adamw(Tensor& p, Tensor& m, Tensor& v, const Tensor& g, const Tensor& clock, AdamWStep s) {
  const double* const c = clock.data<double>();
  if (std::isinf(c[1])) return;
  visit_float("adamw", p.dtype(), [&]<class T>() {
    T *pp = p.data<T>(), *pm = m.data<T>(), *pv = v.data<T>();
    const T* pg = g.data<T>();
    const T b1 = static_cast<T>(s.beta1), b2 = static_cast<T>(s.beta2), eps = static_cast<T>(s.eps);
    const double lr = s.lr * c[3];
    const T keep = static_cast<T>(1.0 - lr * s.weight_decay), step = static_cast<T>(lr / c[1]);
    const T root = static_cast<T>(1.0 / std::sqrt(c[2]));
    parallel_for(p.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        pm[i] = b1 * pm[i] + (T(1) - b1) * pg[i];
        pv[i] = b2 * pv[i] + (T(1) - b2) * pg[i] * pg[i];
        pp[i] = keep * pp[i] - step * pm[i] / (std::sqrt(pv[i]) * root + eps);
      }
    });
  });
}

}  // namespace omq::cpu
