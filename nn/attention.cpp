// Grouped-query attention.
#include "nn/attention.h"

#include <cmath>
#include <numeric>

#include "autograd/ops.h"

namespace omq::nn {

Positions positions(int64_t first, int64_t count, const RopeTables& tables) {
  check(first + count <= tables.cos.dim(0),
        "positions {}…{} leave the rotary table of {}; raise the context length", first,
        first + count - 1, tables.cos.dim(0));
  std::vector<int32_t> index(static_cast<size_t>(count));
  std::iota(index.begin(), index.end(), static_cast<int32_t>(first));
  return {Tensor::from<int32_t>(index, {count}, tables.cos.device()), tables};
}

Tensor Attention::operator()(const Tensor& x, const Positions& at, KVCache* cache) const {
  const int64_t B = x.dim(0), T = x.dim(1);
  Tensor q = reshape(q_proj(x), {B, T, heads, head_dim});
  Tensor k = reshape(k_proj(x), {B, T, kv_heads, head_dim});
  Tensor v = reshape(v_proj(x), {B, T, kv_heads, head_dim});
  if (q_norm) q = (*q_norm)(q);
  if (k_norm) k = (*k_norm)(k);
  q = rope(q, at.tables.cos, at.tables.sin, at.index);
  k = rope(k, at.tables.cos, at.tables.sin, at.index);
  if (taps.q) q = taps.q(q);
  if (taps.k) k = taps.k(k);
  if (taps.v) v = taps.v(v);
  if (cache) {
    check(!needs_grad(k) && !needs_grad(v),
          "attention: no gradient goes through a KV cache; train without one");
    auto stored = cache->append(k, v);
    k = stored.k;
    v = stored.v;
  }
  const AttentionSpec spec{.scale = 1.0 / std::sqrt(static_cast<double>(head_dim)), .causal = true};
  const Tensor y = taps.p ? attention_composed(q, k, v, spec, taps.p) : attention(q, k, v, spec);
  return o_proj(reshape(y, {B, T, heads * head_dim}));
}

}  // namespace omq::nn
