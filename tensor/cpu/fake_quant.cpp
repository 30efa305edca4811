// Fake quantisation of a weight matrix by groups of a row, its straight-through gradient, and the
// codes themselves (spec omniquant §2.4, §2.6). Rounds x/h first, adds the whole number z, then
// clamps.
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

// Calls body(group, first column, columns) for each group of the rows in parallel.
template <class F> void for_each_group(int64_t rows, int64_t cols, const GroupSpec& s, F&& body) {
  const int64_t width = s.group_cols(cols), groups = s.groups(cols);
  parallel_for(rows, std::max<int64_t>(1, kGrain / cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t g = 0; g < groups; ++g)
        body(r * groups + g, r * cols + g * width, std::min(width, cols - g * width));
  });
}

// Codes strictly inside (first, last) let gradient through: the end codes are clamped, or about to
// be.
template <class T> struct Inside {
  T first, last;
  explicit Inside(const GroupSpec& s)
      : first(s.end_codes_learn ? T(-0.5) : T(0)),
        last(static_cast<T>(s.max_code()) + (s.end_codes_learn ? T(0.5) : T(0))) {}
  bool operator()(T t) const { return (t > first) & (t < last); }
};

template <class T> T code(T x, T h, T z, T top) {
  const T t = round_even(x / h) + z;
  return t < T(0) ? T(0) : t > top ? top : t;
}

}  // namespace

void fake_quant(Tensor& y, const Tensor& x, const Tensor& scale, const Tensor& zero, GroupSpec s) {
  visit_float("fake_quant", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *hs = scale.data<T>(), *zs = zero.data<T>();
    const T top = static_cast<T>(s.max_code());
    const auto write = [&]<class Y>(Y* out) {
      for_each_group(x.dim(0), x.dim(1), s, [&](int64_t g, int64_t at, int64_t n) {
        const T h = hs[g], z = zs[g];
        const T* p = in + at;
        Y* o = out + at;
        for (int64_t i = 0; i < n; ++i) o[i] = static_cast<Y>((code(p[i], h, z, top) - z) * h);
      });
    };
    if (y.dtype() == x.dtype()) return write(y.data<T>());
    if constexpr (std::is_same_v<T, float>)
      return y.dtype() == DType::BF16 ? write(y.data<bf16_t>()) : write(y.data<f16_t>());
  });
}

// S = Σ g · [(q − z) − in · x/h] is the gradient of h; in · g that of x, where `in` says that
// the code lies inside the range.
void fake_quant_vjp(Tensor& dx, Tensor& dscale, const Tensor& x, const Tensor& scale,
                    const Tensor& zero, const Tensor& dy, GroupSpec s) {
  visit_float("fake_quant_vjp", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *hs = scale.data<T>(), *zs = zero.data<T>(), *pd = dy.data<T>();
    T* out = dx.defined() ? dx.data<T>() : nullptr;
    T* ds = dscale.defined() ? dscale.data<T>() : nullptr;
    const T top = static_cast<T>(s.max_code());
    const Inside<T> inside(s);
    for_each_group(x.dim(0), x.dim(1), s, [&](int64_t g, int64_t at, int64_t n) {
      const T h = hs[g], z = zs[g];
      const T *p = in + at, *d = pd + at;
      if (ds)  // copies, not references: else the sum does not vectorise
        ds[g] = lane_sum_apart<T>(n, [=](int64_t i) {
          const T r = p[i] / h, t = round_even(r) + z;
          const T inner = inside(t) ? r : T(0);
          const T q = t < T(0) ? T(0) : t > top ? top : t;
          return d[i] * ((q - z) - inner);
        });
      if (out)
        for (int64_t i = 0; i < n; ++i) {
          const T t = round_even(p[i] / h) + z;
          out[at + i] = inside(t) ? d[i] : T(0);
        }
    });
  });
}

void fake_quant_range_vjp(Tensor& dx, const Tensor& x, const Tensor& scale, const Tensor& zero,
                          const Tensor& hi, const Tensor& lo, const Tensor& dhi, const Tensor& dlo,
                          const Tensor& dy, GroupSpec s) {
  visit_float("fake_quant_range_vjp", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *hs = scale.data<T>(), *zs = zero.data<T>(), *pd = dy.data<T>(),
            *tops = hi.data<T>(), *bottoms = lo.data<T>(), *dt = dhi.data<T>(), *db = dlo.data<T>();
    T* out = dx.data<T>();
    const Inside<T> inside(s);
    for_each_group(x.dim(0), x.dim(1), s, [&](int64_t g, int64_t at, int64_t n) {
      const T h = hs[g], z = zs[g], top = tops[g], bottom = bottoms[g];
      const T *p = in + at, *d = pd + at;
      const Extremes<T> count = counts(p, n, {top, bottom});
      const T share_hi = count.hi > 0 ? dt[g] / count.hi : T(0);
      const T share_lo = count.lo > 0 ? db[g] / count.lo : T(0);
      for (int64_t i = 0; i < n; ++i)
        out[at + i] = (inside(round_even(p[i] / h) + z) ? d[i] : T(0)) +
                      ((p[i] == top ? share_hi : T(0)) + (p[i] == bottom ? share_lo : T(0)));
    });
  });
}

void quantize_codes(Tensor& codes, const Tensor& x, const Tensor& scale, const Tensor& zero,
                    GroupSpec s) {
  visit_float("quantize_codes", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *hs = scale.data<T>(), *zs = zero.data<T>();
    uint8_t* out = codes.data<uint8_t>();
    const T top = static_cast<T>(s.max_code());
    for_each_group(x.dim(0), x.dim(1), s, [&](int64_t g, int64_t at, int64_t n) {
      for (int64_t i = 0; i < n; ++i)
        out[at + i] = static_cast<uint8_t>(code(in[at + i], hs[g], zs[g], top));
    });
  });
}

}  // namespace omq::cpu
