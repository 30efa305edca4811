// RMSNorm (spec omniquant §5.1): y = x / √(mean x² + eps) ⊙ w + b. b exists for the shifts of LET
// only.
#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq {

Tensor rms_norm_composed(const Tensor& x, const Tensor& w, const Tensor& b, double eps) {
  Shape rows = x.shape();
  rows[rows.n - 1] = 1;
  const Tensor mean_square = sum_to(square(x), rows) * (1.0 / static_cast<double>(x.dim(-1)));
  Tensor y = div(x, sqrt(mean_square + eps));
  if (w.defined()) y = mul(y, w);
  return b.defined() ? add(y, b) : y;
}

Tensor rms_norm(const Tensor& x, const Tensor& w, const Tensor& b, double eps) {
  check(x.ndim() >= 1 && x.dim(-1) > 0, "rms_norm: x {} has no last dim to normalise over",
        x.shape());
  for (const Tensor& t : {w, b})
    check(!t.defined() || (t.ndim() == 1 && t.dim(0) == x.dim(-1)),
          "rms_norm: x {} with a weight or bias of {}", x.shape(), t.shape());
  const Tensor source = contiguous(x);
  const Tensor gain = w.defined() ? contiguous(w) : w, shift = b.defined() ? contiguous(b) : b;
  Tensor y = Tensor::empty(source.shape(), product_dtype(source), source.device());
  on(source).rms_norm(y, source, gain, shift, eps);
  const bool need_x = needs_grad(x), need_w = needs_grad(w), need_b = needs_grad(b);
  return record("rms_norm", y, {source, gain, shift},
                [x = source.detach(), w = gain.detach(), need_x, need_w, need_b,
                 eps](const Tensor& dy) -> Grads {
                  Tensor dx, dw, db;
                  const Shape width{x.dim(-1)};
                  if (need_x) dx = empty_like(x);
                  if (need_w) dw = Tensor::empty(width, wide_dtype(x.dtype()), x.device());
                  if (need_b) db = Tensor::empty(width, wide_dtype(x.dtype()), x.device());
                  on(x).rms_norm_vjp(dx, dw, db, x, w, contiguous(dy), eps);
                  return {dx, dw, db};
                });
}

}  // namespace omq
