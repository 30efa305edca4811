// Row look-up and its gradient. The gradient adds rows in the order of the ids, column strip by
// column strip, so equal ids never race.
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {

void embedding(Tensor& y, const Tensor& table, const Tensor& ids) {
  const int64_t n = table.dim(1), count = ids.numel();
  const int32_t* id = ids.data<int32_t>();
  for (int64_t i = 0; i < count; ++i)
    check(id[i] >= 0 && id[i] < table.dim(0), "embedding: id {} outside the vocabulary of {}",
          id[i], table.dim(0));
  auto rows = [&]<class T, class Out>(const T* in, Out* out) {
    parallel_for(count, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < n; ++j) out[i * n + j] = static_cast<Out>(in[id[i] * n + j]);
    });
  };
  switch (table.dtype()) {
    case DType::F64:
      return rows(table.data<double>(), y.data<double>());
    case DType::F32:
      return rows(table.data<float>(), y.data<float>());
    case DType::BF16:
      return rows(table.data<bf16_t>(), y.data<float>());
    case DType::F16:
      return rows(table.data<f16_t>(), y.data<float>());
    default:
      fail("embedding: a table of {} cannot be read", dtype_name(table.dtype()));
  }
}

void embedding_vjp(Tensor& dtable, const Tensor& ids, const Tensor& dy) {
  const int64_t n = dtable.dim(1), count = ids.numel();
  const int32_t* id = ids.data<int32_t>();
  fill(dtable, 0.0);
  visit_float("embedding_vjp", dy.dtype(), [&]<class T>() {
    const T* d = dy.data<T>();
    T* out = dtable.data<T>();
    parallel_for(n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = begin; j < end; ++j) out[id[i] * n + j] += d[i * n + j];
    });
  });
}

}  // namespace omq::cpu
