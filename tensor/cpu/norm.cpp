// RMSNorm: y = x · r ⊙ w + b with r = 1/√(mean x² + eps), and silu(gate) ⊙ up. One row at a time.
#include <vector>

#include "tensor/cpu/loops.h"
#include "tensor/cpu/silu_row.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

template <class T> [[gnu::always_inline]] inline T inverse_rms(const T* p, int64_t n, double eps) {
  const double ss = lane_sum<double>(
      n, [p](int64_t i) { return static_cast<double>(p[i]) * static_cast<double>(p[i]); });
  return static_cast<T>(1.0 / std::sqrt(ss / static_cast<double>(n) + eps));
}

template <class T>
[[gnu::always_inline]] inline void norm_row(T* o, const T* p, const T* gain, const T* shift,
                                            int64_t n, double eps) {
  const T s = inverse_rms(p, n, eps);
  if (!gain) {
    for (int64_t i = 0; i < n; ++i) o[i] = p[i] * s;
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const T hat = p[i] * s;
      o[i] = hat * gain[i];
    }
  }
  if (shift)
    for (int64_t i = 0; i < n; ++i) o[i] += shift[i];
}
OMQ_WIDE void norm_row_of(float* o, const float* p, const float* gain, const float* shift,
                          int64_t n, double eps) {
  norm_row(o, p, gain, shift, n, eps);
}
void norm_row_of(double* o, const double* p, const double* gain, const double* shift, int64_t n,
                 double eps) {
  norm_row(o, p, gain, shift, n, eps);
}

template <class T>
[[gnu::always_inline]] inline void silu_row(T* o, const T* gate, const T* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) o[i] = fn::Silu{}.fwd(gate[i]) * up[i];
}
}  // namespace

OMQ_WIDE void silu_mul_row(float* out, const float* gate, const float* up, int64_t n) {
  silu_row(out, gate, up, n);
}

static void silu_mul_row(double* o, const double* gate, const double* up, int64_t n) {
  silu_row(o, gate, up, n);
}

void rms_norm(Tensor& y, const Tensor& x, const Tensor& w, const Tensor& b, double eps) {
  const int64_t n = x.shape().back();
  visit_float("rms_norm", x.dtype(), [&]<class T>() {
    const T* in = x.data<T>();
    const T* gain = w.defined() ? w.data<T>() : nullptr;
    const T* shift = b.defined() ? b.data<T>() : nullptr;
    T* out = y.data<T>();
    parallel_for(rows_of(x), std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        norm_row_of(out + r * n, in + r * n, gain, shift, n, eps);
    });
  });
}

// With x̂ = x·r and u = dy ⊙ w:  dx = r (u − x̂ · mean(u ⊙ x̂)),  dw = Σ dy ⊙ x̂,  db = Σ dy.
void rms_norm_vjp(Tensor& dx, Tensor& dw, Tensor& db, const Tensor& x, const Tensor& w,
                  const Tensor& dy, double eps) {
  const int64_t n = x.shape().back(), rows = rows_of(x);
  visit_float("rms_norm_vjp", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *pd = dy.data<T>();
    const T* gain = w.defined() ? w.data<T>() : nullptr;
    T* out = dx.defined() ? dx.data<T>() : nullptr;
    // dw and db: fixed blocks of rows leave partial sums, which are added in order.
    constexpr int64_t kBlock = 64;
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    const bool sums = dw.defined() || db.defined();
    std::vector<double> part_w(sums ? static_cast<size_t>(blocks * n) : 0), part_b(part_w.size());
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t r = block * kBlock; r < std::min(rows, (block + 1) * kBlock); ++r) {
          const T *p = in + r * n, *d = pd + r * n;
          const T s = inverse_rms(p, n, eps);
          if (out) {
            T* o = out + r * n;
            const T dot = lane_sum_apart<T>(
                n, [&](int64_t i) { return d[i] * (gain ? gain[i] : T(1)) * p[i]; });
            const T c = dot * s * s * s / static_cast<T>(n);
            for (int64_t i = 0; i < n; ++i) o[i] = d[i] * (gain ? gain[i] : T(1)) * s - p[i] * c;
          }
          if (sums) {
            double *sw = part_w.data() + block * n, *sb = part_b.data() + block * n;
            for (int64_t i = 0; i < n; ++i) {
              sw[i] += static_cast<double>(d[i] * p[i] * s);
              sb[i] += static_cast<double>(d[i]);
            }
          }
        }
    });
    auto fold = [&](Tensor& sum, const std::vector<double>& parts) {
      if (!sum.defined()) return;
      T* o = sum.data<T>();
      for (int64_t i = 0; i < n; ++i) {
        double total = 0;
        for (int64_t block = 0; block < blocks; ++block)
          total += parts[static_cast<size_t>(block * n + i)];
        o[i] = static_cast<T>(total);
      }
    };
    fold(dw, part_w);
    fold(db, part_b);
  });
}

void silu_mul(Tensor& y, const Tensor& gate, const Tensor& up) {
  visit_float("silu_mul", gate.dtype(), [&]<class T>() {
    const T *g = gate.data<T>(), *u = up.data<T>();
    T* o = y.data<T>();
    parallel_for(y.numel(), kGrain, [&](int64_t begin, int64_t end) {
      silu_mul_row(o + begin, g + begin, u + begin, end - begin);
    });
  });
}

void silu_mul_vjp(Tensor& dgate, Tensor& dup, const Tensor& gate, const Tensor& up,
                  const Tensor& dy) {
  visit_float("silu_mul_vjp", gate.dtype(), [&]<class T>() {
    const T *g = gate.data<T>(), *u = up.data<T>(), *d = dy.data<T>();
    T *og = dgate.data<T>(), *ou = dup.data<T>();
    parallel_for(gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T s = T(1) / (T(1) + exp_fast(-g[i]));
        og[i] = d[i] * u[i] * (s * (T(1) + g[i] * (T(1) - s)));
        ou[i] = d[i] * (g[i] * s);
      }
    });
  });
}

}  // namespace omq::cpu
