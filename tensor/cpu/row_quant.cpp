// Fake quantisation of every row on its own range, and its straight-through gradient (spec
// omniquant §2.6 with σ(u) = σ(l) = 1): x̂ depends on x directly and through the row's extremes.
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

template <class F> void for_each_token(const Tensor& x, F&& body) {
  const int64_t n = x.shape().back();
  parallel_for(rows_of(x), std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, n)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) body(r * n, n);
               });
}

template <class T> struct Extremes { T hi, lo; };
template <class T> Extremes<T> extremes(const T* p, int64_t n) {
  return {lane_max<T>(n, p[0], [p](int64_t i) { return p[i]; }),
          -lane_max<T>(n, -p[0], [p](int64_t i) { return -p[i]; })};
}

}  // namespace

void fake_quant_rows(Tensor& y, const Tensor& x, RowQuant s) {
  visit_float("fake_quant_rows", x.dtype(), [&]<class T>() {
    const T* in = x.data<T>();
    T* out = y.data<T>();
    const T top = static_cast<T>(s.max_code());
    for_each_token(x, [&](int64_t at, int64_t n) {
      const T* p = in + at;
      T* o = out + at;
      const auto [hi, lo] = extremes(p, n);
      const RowGrid<T> g = row_grid(hi, lo, s);
      for (int64_t i = 0; i < n; ++i) o[i] = (row_code(p[i], g, top) - g.zero) * g.scale;
    });
  });
}

// With S = Σ dy · [(q − z) − in · x/h], the gradient of h: dx = in · dy, plus S/(2ᵇ−1) shared by
// the elements that are the row's maximum, less the same shared by its minima. A bound that is the
// zero put in belongs to no element, unless one is 0.
void fake_quant_rows_vjp(Tensor& dx, const Tensor& x, const Tensor& dy, RowQuant s) {
  visit_float("fake_quant_rows_vjp", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *pd = dy.data<T>();
    T* out = dx.data<T>();
    const T top = static_cast<T>(s.max_code());
    const T first = s.end_codes_learn ? T(-0.5) : T(0), last = top - first;
    for_each_token(x, [&](int64_t at, int64_t n) {
      const T *p = in + at, *d = pd + at;
      T* o = out + at;
      auto [hi, lo] = extremes(p, n);
      const RowGrid<T> g = row_grid(hi, lo, s);
      const T total = lane_sum<T>(n, [&](int64_t i) {
        const T r = p[i] / g.scale, t = round_even(r) + g.zero;
        const bool in_range = t > first && t < last;
        const T q = t < T(0) ? T(0) : t > top ? top : t;
        o[i] = in_range ? d[i] : T(0);
        return d[i] * ((q - g.zero) - (in_range ? r : T(0)));
      });
      if (!g.free_scale) return;
      if (s.include_zero) hi = std::max(hi, T(0)), lo = std::min(lo, T(0));
      T count_hi = 0, count_lo = 0;
      for (int64_t i = 0; i < n; ++i) {
        count_hi += p[i] == hi ? T(1) : T(0);
        count_lo += p[i] == lo ? T(1) : T(0);
      }
      const T up = count_hi > 0 ? total / top / count_hi : T(0);
      const T down = count_lo > 0 ? total / top / count_lo : T(0);
      for (int64_t i = 0; i < n; ++i) o[i] += (p[i] == hi ? up : T(0)) - (p[i] == lo ? down : T(0));
    });
  });
}

}  // namespace omq::cpu
