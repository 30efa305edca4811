// The fold of an equivalent transformation: diag(rows) · W · diag(cols), made and differentiated in
// one pass over the matrix.
#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq {

Tensor scale_matrix_composed(const Tensor& w, const Tensor& rows, const Tensor& cols) {
  Tensor y = w;
  if (cols.defined()) y = y * cols;
  return rows.defined() ? y * reshape(rows, {rows.numel(), 1}) : y;
}

Tensor scale_matrix(const Tensor& w, const Tensor& rows, const Tensor& cols) {
  check(w.ndim() == 2, "scale_matrix: wants [rows, cols], got {}", w.shape());
  for (int d = 0; d < 2; ++d) {
    const Tensor& by = d == 0 ? rows : cols;
    check(!by.defined() ||
              (by.ndim() == 1 && by.dim(0) == w.dim(d) && by.dtype() == wide_dtype(w.dtype())),
          "scale_matrix: w {} {} with {} of {} {}", dtype_name(w.dtype()), w.shape(),
          d == 0 ? "rows" : "columns", by.defined() ? dtype_name(by.dtype()) : "",
          by.defined() ? by.shape() : Shape{});
  }
  const auto dense = [](const Tensor& t) { return t.defined() ? contiguous(t) : t; };
  const Tensor source = contiguous(w), r = dense(rows), c = dense(cols);
  Tensor y = Tensor::empty(source.shape(), wide_dtype(w.dtype()), w.device());
  on(w).scale_matrix(y, source, r, c);
  const bool need_w = needs_grad(w), need_rows = r.defined() && needs_grad(r),
             need_cols = c.defined() && needs_grad(c);
  return record(
      "scale_matrix", y, {source, r, c},
      [w = source.detach(), r = r.defined() ? r.detach() : r, c = c.defined() ? c.detach() : c,
       need_w, need_rows, need_cols](const Tensor& dy_any) -> Grads {
        const Tensor dy = contiguous(dy_any);
        Tensor dw, dr, dc;
        if (need_w) {
          dw = empty_like(dy);
          on(dy).scale_matrix(dw, dy, r, c);
        }
        if (need_rows) dr = empty_like(r);
        if (need_cols) dc = empty_like(c);
        if (need_rows || need_cols) on(dy).scale_matrix_vjp(dr, dc, w, r, c, dy);
        return {dw, dr, dc};
      });
}

}  // namespace omq
