// Cross-entropy per row, in nats: loss = log Σ exp(x) − x[target]. Row sums run in double over
// short float runs.
#include <vector>

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

void mse(Tensor& loss, const Tensor& a, const Tensor& b) {
  const int64_t n = a.numel();
  constexpr int64_t kRun = 512, kPart = 64 * kRun;  // sums of short runs in T, the rest in double
  visit_float("mse", a.dtype(), [&]<class T>() {
    const T *x = a.data<T>(), *y = b.data<T>();
    std::vector<double> parts(static_cast<size_t>((n + kPart - 1) / kPart));
    parallel_for(static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        double total = 0;
        for (int64_t s = p * kPart; s < std::min(n, (p + 1) * kPart); s += kRun)
          total += static_cast<double>(lane_sum<T>(std::min(kRun, n - s), [=](int64_t i) {
            const T d = x[s + i] - y[s + i];
            return d * d;
          }));
        parts[static_cast<size_t>(p)] = total;
      }
    });
    double total = 0;
    for (const double p : parts) total += p;
    loss.data<T>()[0] = static_cast<T>(total / static_cast<double>(n));
  });
}

void mse_vjp(Tensor& da, Tensor& db, const Tensor& a, const Tensor& b, const Tensor& dloss) {
  const int64_t n = a.numel();
  visit_float("mse_vjp", a.dtype(), [&]<class T>() {
    const T *x = a.data<T>(), *y = b.data<T>();
    T *to_a = da.defined() ? da.data<T>() : nullptr, *to_b = db.defined() ? db.data<T>() : nullptr;
    const T g = dloss.data<T>()[0] * static_cast<T>(1.0 / static_cast<double>(n));
    parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T d = g * (T(2) * (x[i] - y[i]));
        if (to_a) to_a[i] = d;
        if (to_b) to_b[i] = -d;
      }
    });
  });
}

}  // namespace omq::cpu
