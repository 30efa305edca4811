// Scalar functions over strided tensors. The functors are in tensor/elementwise.h; inner loops are
// written for the strides that matter (1 and 0), so that they vectorise.
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

// Calls body(step_a, step_b) with compile-time strides where both are 0 or 1.
template <class F> void with_steps(int64_t a, int64_t b, F&& body) {
  using One = std::integral_constant<int64_t, 1>;
  using Zero = std::integral_constant<int64_t, 0>;
  if (a == 1 && b == 1) return body(One{}, One{});
  if (a == 1 && b == 0) return body(One{}, Zero{});
  if (a == 0 && b == 1) return body(Zero{}, One{});
  body(a, b);
}

}  // namespace

void unary(Tensor& y, const Tensor& x, Unary u) {
  visit_float("unary", x.dtype(), [&]<class T>() {
    T* out = y.data<T>();
    const T* in = x.data<T>();
    visit_unary(u, [&](auto f) {
      for_each_row<2>(x.shape(), {y.strides(), x.strides()}, [&](auto at, int64_t n, auto step) {
        T* o = out + at[0];
        const T* p = in + at[1];
        with_steps(step[0], step[1], [&](auto so, auto sp) {
          for (int64_t i = 0; i < n; ++i) o[i * so] = f.fwd(p[i * sp]);
        });
      });
    });
  });
}

void unary_vjp(Tensor& dx, const Tensor& x, const Tensor& y, const Tensor& dy, Unary u) {
  visit_float("unary_vjp", x.dtype(), [&]<class T>() {
    T* out = dx.data<T>();
    const T *px = x.data<T>(), *py = y.data<T>(), *pd = dy.data<T>();
    visit_unary(u, [&](auto f) {
      for_each_row<4>(x.shape(), {dx.strides(), x.strides(), y.strides(), dy.strides()},
                      [&](auto at, int64_t n, auto step) {
                        T* o = out + at[0];
                        const T *a = px + at[1], *b = py + at[2], *d = pd + at[3];
                        if (step[0] == 1 && step[1] == 1 && step[2] == 1 && step[3] == 1) {
                          for (int64_t i = 0; i < n; ++i) o[i] = d[i] * f.bwd(a[i], b[i]);
                        } else {
                          for (int64_t i = 0; i < n; ++i)
                            o[i * step[0]] = d[i * step[3]] * f.bwd(a[i * step[1]], b[i * step[2]]);
                        }
                      });
    });
  });
}

void binary(Tensor& y, const Tensor& a, const Tensor& b, Binary kind) {
  visit_float("binary", a.dtype(), [&]<class T>() {
    T* out = y.data<T>();
    const T *pa = a.data<T>(), *pb = b.data<T>();
    visit_binary(kind, [&](auto f) {
      for_each_row<3>(y.shape(), {y.strides(), a.strides(), b.strides()},
                      [&](auto at, int64_t n, auto step) {
                        T* o = out + at[0];
                        const T *l = pa + at[1], *r = pb + at[2];
                        if (step[0] != 1) {
                          for (int64_t i = 0; i < n; ++i)
                            o[i * step[0]] = f.fwd(l[i * step[1]], r[i * step[2]]);
                          return;
                        }
                        with_steps(step[1], step[2], [&](auto sl, auto sr) {
                          for (int64_t i = 0; i < n; ++i) o[i] = f.fwd(l[i * sl], r[i * sr]);
                        });
                      });
    });
  });
}

void binary_vjp(Tensor& da, Tensor& db, const Tensor& a, const Tensor& b, const Tensor& dy,
                Binary kind) {
  visit_float("binary_vjp", a.dtype(), [&]<class T>() {
    const T *pa = a.data<T>(), *pb = b.data<T>(), *pd = dy.data<T>();
    auto run = [&](Tensor& out_tensor, auto slope) {
      T* out = out_tensor.data<T>();
      for_each_row<4>(dy.shape(), {out_tensor.strides(), a.strides(), b.strides(), dy.strides()},
                      [&](auto at, int64_t n, auto step) {
                        T* o = out + at[0];
                        const T *l = pa + at[1], *r = pb + at[2], *d = pd + at[3];
                        if (step[0] == 1 && step[3] == 1) {
                          with_steps(step[1], step[2], [&](auto sl, auto sr) {
                            for (int64_t i = 0; i < n; ++i)
                              o[i] = d[i] * slope(l[i * sl], r[i * sr]);
                          });
                        } else {
                          for (int64_t i = 0; i < n; ++i)
                            o[i * step[0]] = d[i * step[3]] * slope(l[i * step[1]], r[i * step[2]]);
                        }
                      });
    };
    visit_binary(kind, [&](auto f) {
      if (da.defined()) run(da, [f](T l, T r) { return f.da(l, r); });
      if (db.defined()) run(db, [f](T l, T r) { return f.db(l, r); });
    });
  });
}

}  // namespace omq::cpu
