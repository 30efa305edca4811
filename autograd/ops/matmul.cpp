// Matrix products. Transposes are strides, so every gradient is again the same kernel. Operands are
// rounded to the type of the ComputeScope; results are F32 unless they are made to be multiplied.
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

Tensor product(const Tensor& a, const Tensor& b, DType type) {
  Shape shape = a.shape();
  shape[a.ndim() - 1] = b.dim(-1);
  Tensor y = Tensor::empty(shape, type, a.device());
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
  const bool need_a = needs_grad(a), need_b = needs_grad(b);
  const Tensor la = rounded(a, operand_dtype(a.dtype())), lb = rounded(b, operand_dtype(b.dtype()));
  const DType type = la.dtype();
  check(type == lb.dtype(), "matmul: dtypes differ: {} and {}", dtype_name(a.dtype()),
        dtype_name(b.dtype()));
  return record(
      "matmul", product(la, lb, wide_dtype(type)), {a, b},
      [a = need_b ? la : Tensor{}, b = need_a ? lb : Tensor{}, need_a, need_b, type,
       type_a = gradient_dtype(a), type_b = gradient_dtype(b)](const Tensor& dy_any) -> Grads {
        const Tensor dy = rounded(dy_any, type);
        Grads g(2);
        if (need_a) g[0] = product(dy, transposed(b), type_a);
        if (need_b) g[1] = product(transposed(a), dy, type_b);
        return g;
      });
}

Tensor linear(const Tensor& x, const Tensor& w, const Tensor& bias, WriteAs write) {
  check(w.ndim() == 2 && x.ndim() >= 1 && x.dim(-1) == w.dim(1),
        "linear: inner dims differ: x {} · w {}ᵀ", x.shape(), w.shape());
  Shape shape = x.shape();
  shape[x.ndim() - 1] = w.dim(0);
  const Tensor rows = reshape(x, {-1, x.dim(-1)});
  const bool need_x = needs_grad(rows), need_w = needs_grad(w);
  // Not matmul(rows, wᵀ): its gradient in w would come out transposed and have to be copied back
  // into rows.
  const Tensor lx = rounded(rows, operand_dtype(x.dtype())),
               lw = rounded(w, operand_dtype(w.dtype()));
  const DType type = lx.dtype();
  check(type == lw.dtype(), "linear: dtypes differ: {} and {}", dtype_name(x.dtype()),
        dtype_name(w.dtype()));
  const bool narrow =
      write == WriteAs::Operand && !bias.defined() && x.device().type != DeviceType::CPU;
  const Tensor y = record(
      "linear", product(lx, transposed(lw), narrow ? type : wide_dtype(type)), {rows, w},
      [x = need_w ? lx : Tensor{}, w = need_x ? lw : Tensor{}, need_x, need_w, type,
       type_x = gradient_dtype(rows), type_w = gradient_dtype(w)](const Tensor& dy_any) -> Grads {
        const Tensor dy = rounded(dy_any, type);
        Grads g(2);
        if (need_x) g[0] = product(dy, w, type_x);              // dx = dy · W
        if (need_w) g[1] = product(transposed(dy), x, type_w);  // dW = dyᵀ · x
        return g;
      });
  const Tensor out = reshape(y, shape);
  return bias.defined() ? add(out, bias) : out;
}

}  // namespace omq
