// Scalar functions and broadcasting arithmetic. The formulas and derivatives are in
// tensor/elementwise.h.
#include "autograd/compute.h"
#include "autograd/frozen.h"
#include "autograd/ops.h"

namespace omq {
namespace {

Tensor unary(const char* name, const Tensor& x, Unary f) {
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  on(x).unary(y, x, f);
  const bool grad = needs_grad(x);
  return record(name, y, {x},
                [x = grad ? x.detach() : Tensor{}, y = grad ? y.detach() : Tensor{},
                 f](const Tensor& dy) -> Grads {
                  Tensor dx = Tensor::empty(x.shape(), x.dtype(), x.device());
                  on(x).unary_vjp(dx, x, y, dy, f);
                  return {dx};
                });
}

Shape broadcast_shape(const char* name, const Shape& a, const Shape& b) {
  Shape out;
  const int n = std::max(a.n, b.n);
  for (int i = 0; i < n; ++i) {
    const int ia = i - (n - a.n), ib = i - (n - b.n);
    const int64_t da = ia < 0 ? 1 : a[ia], db = ib < 0 ? 1 : b[ib];
    check(da == db || da == 1 || db == 1, "{}: shapes {} and {} do not broadcast", name, a, b);
    out.push_back(da == 1 ? db : da);
  }
  return out;
}

// x as a stride-0 view of `shape`, without history.
Tensor spread(const Tensor& x, const Shape& shape) {
  if (x.shape() == shape) return x.detach();
  Strides strides;
  for (int i = 0; i < shape.n; ++i) {
    const int j = i - (shape.n - x.ndim());
    strides.push_back(j < 0 || x.dim(j) == 1 ? 0 : x.stride(j));
  }
  return x.alias(shape, strides);
}

// The gradient of a broadcast operand: sum over the dims that were repeated.
Tensor collapse(const Tensor& d, const Shape& shape) {
  if (d.shape() == shape) return d;
  Shape padded;
  for (int i = 0; i < d.ndim() - shape.n; ++i) padded.push_back(1);
  for (int i = 0; i < shape.n; ++i) padded.push_back(shape[i]);
  Tensor y = Tensor::empty(padded, wide_dtype(d.dtype()), d.device());
  on(d).sum_to(y, d);
  return y.alias(shape, contiguous_strides(shape));
}

Tensor binary(const char* name, const Tensor& a, const Tensor& b, Binary f) {
  check(a.defined() && b.defined(), "{}: undefined operand", name);
  check(a.dtype() == b.dtype(), "{}: dtypes differ: {} and {}; convert with to()", name,
        dtype_name(a.dtype()), dtype_name(b.dtype()));
  check(a.device() == b.device(), "{}: devices differ: {} and {}", name, to_string(a.device()),
        to_string(b.device()));
  const Shape shape = broadcast_shape(name, a.shape(), b.shape());
  const Tensor wide_a = spread(a, shape), wide_b = spread(b, shape);
  Tensor y = Tensor::empty(shape, a.dtype(), a.device());
  on(a).binary(y, wide_a, wide_b, f);
  const bool need_a = needs_grad(a), need_b = needs_grad(b), need = need_a || need_b;
  if (f == Binary::Add)  // the gradient of both is that of the sum
    return record(
        name, y, {a, b},
        [need_a, need_b, shape_a = a.shape(), shape_b = b.shape()](const Tensor& dy) -> Grads {
          return {need_a ? collapse(dy, shape_a) : Tensor{},
                  need_b ? collapse(dy, shape_b) : Tensor{}};
        });
  return record(name, y, {a, b},
                [wide_a = need ? wide_a : Tensor{}, wide_b = need ? wide_b : Tensor{}, need_a,
                 need_b, shape_a = a.shape(), shape_b = b.shape(), f](const Tensor& dy) -> Grads {
                  Tensor da, db;
                  if (need_a) da = Tensor::empty(dy.shape(), dy.dtype(), dy.device());
                  if (need_b) db = Tensor::empty(dy.shape(), dy.dtype(), dy.device());
                  on(dy).binary_vjp(da, db, wide_a, wide_b, dy, f);
                  return {need_a ? collapse(da, shape_a) : da, need_b ? collapse(db, shape_b) : db};
                });
}

}  // namespace

Tensor affine(const Tensor& x, double a, double b) {
  return unary("affine", x, {UnaryKind::Affine, a, b});
}
Tensor exp(const Tensor& x) { return unary("exp", x, {UnaryKind::Exp}); }
Tensor log(const Tensor& x) { return unary("log", x, {UnaryKind::Log}); }
Tensor sqrt(const Tensor& x) { return unary("sqrt", x, {UnaryKind::Sqrt}); }
Tensor square(const Tensor& x) { return unary("square", x, {UnaryKind::Square}); }
Tensor abs(const Tensor& x) { return unary("abs", x, {UnaryKind::Abs}); }
Tensor sigmoid(const Tensor& x) { return unary("sigmoid", x, {UnaryKind::Sigmoid}); }
Tensor silu(const Tensor& x) { return unary("silu", x, {UnaryKind::Silu}); }
Tensor clamp(const Tensor& x, double lo, double hi) {
  return unary("clamp", x, {UnaryKind::Clamp, lo, hi});
}
Tensor round(const Tensor& x) { return unary("round", x, {UnaryKind::Round}); }
Tensor round_ste(const Tensor& x) {
  FrozenRounding* const frozen = FrozenRounding::current();
  if (frozen && frozen->replays()) return frozen->repeat(x);
  const Tensor y = unary("round_ste", x, {UnaryKind::RoundSte});
  if (frozen) frozen->note(y, Tensor::full(x.shape(), 1, x.dtype(), x.device()));
  return y;
}

Tensor add(const Tensor& a, const Tensor& b) { return binary("add", a, b, Binary::Add); }
Tensor sub(const Tensor& a, const Tensor& b) { return binary("sub", a, b, Binary::Sub); }
Tensor mul(const Tensor& a, const Tensor& b) { return binary("mul", a, b, Binary::Mul); }
Tensor div(const Tensor& a, const Tensor& b) { return binary("div", a, b, Binary::Div); }
Tensor maximum(const Tensor& a, const Tensor& b) { return binary("maximum", a, b, Binary::Max); }

}  // namespace omq
