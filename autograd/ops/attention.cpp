// Causal attention with grouped queries. The fused op keeps only the log-sum-exp of each row and
// rebuilds the probabilities tile by tile in its gradient; the composed one is its definition.
#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq {
namespace {

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  check(q.ndim() == 4 && k.ndim() == 4 && k.shape() == v.shape(), "attention: q {}, k {}, v {}",
        q.shape(), k.shape(), v.shape());
  check(q.dim(0) == k.dim(0) && q.dim(3) == k.dim(3) && k.dim(2) > 0 && q.dim(2) % k.dim(2) == 0,
        "attention: q {} against k {}: batch, head size or head counts do not fit", q.shape(),
        k.shape());
  check(k.dim(1) >= q.dim(1), "attention: {} queries for {} keys", q.dim(1), k.dim(1));
}
void check_types(const Tensor& q, const Tensor& k, const Tensor& v) {
  check(q.dtype() == k.dtype() && k.dtype() == v.dtype(), "attention: dtypes differ: {}, {} and {}",
        dtype_name(q.dtype()), dtype_name(k.dtype()), dtype_name(v.dtype()));
}

// The kernel reads rows of d: tensors whose rows are torn or shared (expanded) are copied first.
Tensor with_rows(const Tensor& x) {
  return x.stride(3) == 1 && x.stride(1) >= x.dim(3) ? x : contiguous(x);
}

// 0 where a query may look, −1e30 elsewhere: [T, S].
Tensor causal_mask(int64_t t, int64_t s, DType dtype, Device device) {
  std::vector<double> m(static_cast<size_t>(t * s), 0.0);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = s - t + i + 1; j < s; ++j) m[static_cast<size_t>(i * s + j)] = -1e30;
  return to(to(Tensor::from<double>(m, {t, s}), dtype), device);
}

// What was rounded to be multiplied, as F32.
Tensor widened(const Tensor& x) {
  return x.dtype() == DType::BF16 || x.dtype() == DType::F16 ? to(x, DType::F32) : x;
}

}  // namespace

Tensor attention_composed(const Tensor& any_q, const Tensor& any_k, const Tensor& any_v,
                          AttentionSpec spec,
                          const std::function<Tensor(const Tensor&)>& on_probabilities) {
  const Tensor q = widened(any_q), k = widened(any_k), v = widened(any_v);
  check_shapes(q, k, v);
  check_types(q, k, v);
  const int64_t B = q.dim(0), T = q.dim(1), H = q.dim(2), d = q.dim(3), S = k.dim(1), K = k.dim(2);
  auto heads = [&](const Tensor&
                       x) {  // [B,S,K,d] → [B,H,S,d], every key/value head repeated for its queries
    const Tensor y = reshape(transpose(x, 1, 2), {B, K, 1, S, d});
    return reshape(expand(y, {B, K, H / K, S, d}), {B, H, S, d});
  };
  Tensor scores = matmul(transpose(q, 1, 2), transpose(heads(k), 2, 3)) * spec.scale;  // [B,H,T,S]
  if (spec.causal) scores = scores + causal_mask(T, S, q.dtype(), q.device());
  Tensor p = softmax(scores);
  if (on_probabilities) p = on_probabilities(p);
  return contiguous(transpose(matmul(p, heads(v)), 1, 2));
}

Tensor attention(const Tensor& any_q, const Tensor& any_k, const Tensor& any_v,
                 AttentionSpec spec) {
  check_shapes(any_q, any_k, any_v);
  const Tensor q = with_rows(any_q), k = with_rows(any_k), v = with_rows(any_v);
  // Queries and keys may come rounded already, beside values that were not.
  const DType type = operand_dtype(q.dtype());
  const auto operand = [type](const Tensor& x) {
    return operand_dtype(x.dtype()) == type ? rounded(x, type) : x;
  };
  const Tensor lq = operand(q), lk = operand(k), lv = operand(v);
  check_types(lq, lk, lv);
  Tensor y = Tensor::empty(q.shape(), product_dtype(q), q.device());
  Tensor lse = Tensor::empty({q.dim(0), q.dim(2), q.dim(1)}, wide_dtype(type), q.device());
  on(q).attention(y, lse, lq, lk, lv, spec);
  if (!needs_grad(q) && !needs_grad(k) && !needs_grad(v)) return y;
  return record("attention", y, {q, k, v},
                [q = lq, k = lk, v = lv, y = y.detach(), lse, spec](const Tensor& dy) -> Grads {
                  const auto gradient = [&y](const Tensor& x) {
                    return Tensor::empty(x.shape(), y.dtype(), y.device());
                  };
                  Tensor dq = gradient(q), dk = gradient(k), dv = gradient(v);
                  on(q).attention_vjp(dq, dk, dv, q, k, v, y, lse, contiguous(dy), spec);
                  return {dq, dk, dv};
                });
}

}  // namespace omq
