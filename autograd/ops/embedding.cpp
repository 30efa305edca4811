// Row look-up. Tables may be stored in 16 bits; rows come out in F32.
#include "autograd/ops.h"

namespace omq {

Tensor embedding(const Tensor& any_table, const Tensor& any_ids) {
  check(any_table.ndim() == 2 && any_ids.dtype() == DType::I32, "embedding: table {} with {} ids",
        any_table.shape(), dtype_name(any_ids.dtype()));
  const Tensor table = contiguous(any_table), ids = contiguous(any_ids);
  Shape shape = ids.shape();
  shape.push_back(table.dim(1));
  const DType out = table.dtype() == DType::F64 ? DType::F64 : DType::F32;
  Tensor y = Tensor::empty(shape, out, table.device());
  on(table).embedding(y, table, ids);
  return record("embedding", y, {table}, [from = table.shape(), ids](const Tensor& dy) -> Grads {
    Tensor d = Tensor::empty(from, dy.dtype(), dy.device());
    on(dy).embedding_vjp(d, ids, contiguous(dy));
    return {d};
  });
}

}  // namespace omq
