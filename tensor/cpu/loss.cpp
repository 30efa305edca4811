// Cross-entropy per row, in nats: loss = log Σ exp(x) − x[target]. Row sums run in double over
// short float runs.
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {

void cross_entropy(Tensor& loss, Tensor& lse, const Tensor& logits, const Tensor& targets) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  const int32_t* target = targets.data<int32_t>();
  for (int64_t r = 0; r < rows; ++r)
    check(target[r] >= -1 && target[r] < n, "cross_entropy: target {} outside the {} classes",
          target[r], n);
  visit_float("cross_entropy", logits.dtype(), [&]<class T>() {
    const T* in = logits.data<T>();
    T *out = loss.data<T>(), *norm = lse.data<T>();
    parallel_for(rows, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* p = in + r * n;
        const T top = lane_max<T>(n, p[0], [p](int64_t i) { return p[i]; });
        double total = 0;
        constexpr int64_t kRun = 512;
        for (int64_t s = 0; s < n; s += kRun)
          total += static_cast<double>(lane_sum<T>(
              std::min(kRun, n - s), [p, s, top](int64_t i) { return exp_fast(p[s + i] - top); }));
        const double log_sum = std::log(total) + static_cast<double>(top);
        norm[r] = static_cast<T>(log_sum);
        out[r] = target[r] < 0 ? T(0) : static_cast<T>(log_sum - static_cast<double>(p[target[r]]));
      }
    });
  });
}

void cross_entropy_vjp(Tensor& dlogits, const Tensor& logits, const Tensor& lse,
                       const Tensor& targets, const Tensor& dloss) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  const int32_t* target = targets.data<int32_t>();
  visit_float("cross_entropy_vjp", logits.dtype(), [&]<class T>() {
    const T *in = logits.data<T>(), *norm = lse.data<T>(), *d = dloss.data<T>();
    T* out = dlogits.data<T>();
    parallel_for(rows, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* p = in + r * n;
        T* o = out + r * n;
        const T g = target[r] < 0 ? T(0) : d[r];
        for (int64_t i = 0; i < n; ++i) o[i] = g * exp_fast(p[i] - norm[r]);
        if (target[r] >= 0) o[target[r]] -= g;
      }
    });
  });
}

}  // namespace omq::cpu
