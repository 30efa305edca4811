// Matrix products. Transposes are strides, so every gradient is again the same kernel. Operands are
// rounded to the type of the ComputeScope; results and gradients stay in F32.
#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq {
namespace {

Tensor transposed(const Tensor& x) {
  Shape shape = x.shape();
  Strides strides = x.strides();
  std::swap(shape[x.ndim() - 1], shape[x.ndim() - 2]);
  std::swap(strides[x.ndim() - 1], strides[x.ndim() - 2]);
  return x.alias(shape, strides);
}

Tensor product(const Tensor& a, const Tensor& b) {
  Shape shape = a.shape();
  shape[a.ndim() - 1] = b.dim(-1);
  Tensor y = Tensor::empty(shape, a.dtype() == DType::F64 ? DType::F64 : DType::F32, a.device());
  on(a).matmul(y, a, b);
  return y;
}

}  // namespace

Tensor matmul(const Tensor& a, const Tensor& b) {
  check(a.ndim() >= 2 && a.ndim() == b.ndim(),
        "matmul: {} · {}: the same number of dims (≥ 2) wanted", a.shape(), b.shape());
  check(a.dim(-1) == b.dim(-2), "matmul: inner dims differ: {} · {}", a.shape(), b.shape());
  for (int i = 0; i < a.ndim() - 2; ++i)
    check(a.dim(i) == b.dim(i), "matmul: batch dims differ: {} · {}", a.shape(), b.shape());
  check(a.dtype() == b.dtype(), "matmul: dtypes differ: {} and {}", dtype_name(a.dtype()),
        dtype_name(b.dtype()));
  const bool need_a = needs_grad(a), need_b = needs_grad(b);
  const DType type = operand_dtype(a.dtype());
  const Tensor la = rounded(a, type), lb = rounded(b, type);
  return record("matmul", product(la, lb), {a, b},
                [a = need_b ? la : Tensor{}, b = need_a ? lb : Tensor{}, need_a, need_b,
                 type](const Tensor& dy_any) -> Grads {
                  const Tensor dy = rounded(dy_any, type);
                  Grads g(2);
                  if (need_a) g[0] = product(dy, transposed(b));
                  if (need_b) g[1] = product(transposed(a), dy);
                  return g;
                });
}

Tensor linear(const Tensor& x, const Tensor& w, const Tensor& bias) {
  check(w.ndim() == 2 && x.ndim() >= 1 && x.dim(-1) == w.dim(1),
        "linear: inner dims differ: x {} · w {}ᵀ", x.shape(), w.shape());
  check(x.dtype() == w.dtype() || operand_dtype(x.dtype()) == w.dtype(),
        "linear: dtypes differ: {} and {}", dtype_name(x.dtype()), dtype_name(w.dtype()));
  Shape shape = x.shape();
  shape[x.ndim() - 1] = w.dim(0);
  const Tensor rows = reshape(x, {-1, x.dim(-1)});
  const bool need_x = needs_grad(rows), need_w = needs_grad(w);
  // Not matmul(rows, wᵀ): its gradient in w would come out transposed and have to be copied back
  // into rows.
  const DType type = operand_dtype(x.dtype());
  const Tensor lx = rounded(rows, type), lw = rounded(w, type);
  const Tensor y = record("linear", product(lx, transposed(lw)), {rows, w},
                          [x = need_w ? lx : Tensor{}, w = need_x ? lw : Tensor{}, need_x, need_w,
                           type](const Tensor& dy_any) -> Grads {
                            const Tensor dy = rounded(dy_any, type);
                            Grads g(2);
                            if (need_x) g[0] = product(dy, w);              // dx = dy · W
                            if (need_w) g[1] = product(transposed(dy), x);  // dW = dyᵀ · x
                            return g;
                          });
  const Tensor out = reshape(y, shape);
  return bias.defined() ? add(out, bias) : out;
}

}  // namespace omq
