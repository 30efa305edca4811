// Softmax over the last dim and its gradient.
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {

void softmax(Tensor& y, const Tensor& x) {
  const int64_t n = x.shape().back();
  visit_float("softmax", x.dtype(), [&]<class T>() {
    const T* in = x.data<T>();
    T* out = y.data<T>();
    parallel_for(rows_of(x), std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* p = in + r * n;
        T* o = out + r * n;
        const T top = lane_max<T>(n, p[0], [p](int64_t i) { return p[i]; });
        for (int64_t i = 0; i < n; ++i) o[i] = exp_fast(p[i] - top);
        const T scale = T(1) / lane_sum<T>(n, [o](int64_t i) { return o[i]; });
        for (int64_t i = 0; i < n; ++i) o[i] *= scale;
      }
    });
  });
}

void softmax_vjp(Tensor& dx, const Tensor& y, const Tensor& dy) {
  const int64_t n = y.shape().back();
  visit_float("softmax_vjp", y.dtype(), [&]<class T>() {
    const T *py = y.data<T>(), *pd = dy.data<T>();
    T* out = dx.data<T>();
    parallel_for(rows_of(y), std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T *p = py + r * n, *d = pd + r * n;
        T* o = out + r * n;
        const T dot = lane_sum<T>(n, [p, d](int64_t i) { return p[i] * d[i]; });
        for (int64_t i = 0; i < n; ++i) o[i] = p[i] * (d[i] - dot);
      }
    });
  });
}

}  // namespace omq::cpu
