// Grouped-query attention.
#include "nn/attention.h"

#include <algorithm>
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

namespace {

constexpr int64_t kWindow = 512;  // keys that become floats together

Tensor on_grid(const Tensor& x, const std::optional<RowQuant>& s) {
  return s ? fake_quant_rows(x, *s) : x;
}

// What attention to some of the keys gives: joined with its like for the others, it is attention to
// all.
struct Part {
  Tensor y;    // [B,T,H,d]
  Tensor lse;  // [B,H,T], log Σ exp of the scores

  Part(const Tensor& q, const KVCache::View& keys, const AttentionSpec& s)
      : y(empty_like(q)),
        lse(Tensor::empty({q.dim(0), q.dim(2), q.dim(1)}, DType::F32, q.device())) {
    on(q).attention(y, lse, q, keys.k, keys.v, s);
  }
  void join(const Part& o) {
    const Tensor top = maximum(lse, o.lse), a = exp(lse - top), b = exp(o.lse - top), all = a + b;
    const auto weight = [&](const Tensor& w) {  // [B,H,T] → [B,T,H,1]
      return reshape(transpose(w, 1, 2), {y.dim(0), y.dim(1), y.dim(2), 1});
    };
    y = y * weight(a / all) + o.y * weight(b / all);
    lse = top + log(all);
  }
};

// Codes become floats a window at a time. All but the last T keys are seen by every query, so only
// the last window is causal.
Tensor attention_by_windows(const Tensor& any_q, const KVCache& cache, AttentionSpec spec) {
  check(!needs_grad(any_q), "attention: no gradient goes through a KV cache; train without one");
  const Tensor q = contiguous(any_q);
  const int64_t T = q.dim(1), S = cache.length();
  int64_t begin = std::max<int64_t>(0, S - std::max(T, kWindow));
  Part all(q, cache.window(begin, S), spec);
  spec.causal = false;
  for (int64_t end = begin; end > 0; end = begin) {
    begin = std::max<int64_t>(0, end - kWindow);
    all.join(Part(q, cache.window(begin, end), spec));
  }
  return all.y;
}

}  // namespace

Tensor Attention::operator()(const Tensor& x, const Positions& at, KVCache* cache) const {
  const int64_t B = x.dim(0), T = x.dim(1);
  const LinearInput in(x);
  Tensor q = reshape(q_proj(in, WriteAs::Operand), {B, T, heads, head_dim});
  Tensor k = reshape(k_proj(in, WriteAs::Operand), {B, T, kv_heads, head_dim});
  Tensor v = reshape(v_proj(in, WriteAs::Operand), {B, T, kv_heads, head_dim});
  if (q_norm) q = (*q_norm)(q);
  if (k_norm) k = (*k_norm)(k);
  q = rope(q, at.tables.cos, at.tables.sin, at.index);
  k = rope(k, at.tables.cos, at.tables.sin, at.index);
  if (taps.q_online) q = (*taps.q_online)(q);
  if (taps.k_online) k = (*taps.k_online)(k);
  q = on_grid(q, taps.q);
  if (!cache || cache->quant().k != taps.k) k = on_grid(k, taps.k);
  if (!cache || cache->quant().v != taps.v) v = on_grid(v, taps.v);
  const AttentionSpec spec{.scale = 1.0 / std::sqrt(static_cast<double>(head_dim)),
                           .causal = true,
                           .learns = cache == nullptr};
  const auto output = [&](const Tensor& y) { return o_proj(reshape(y, {B, T, heads * head_dim})); };
  if (cache) {
    check(!needs_grad(k) && !needs_grad(v),
          "attention: no gradient goes through a KV cache; train without one");
    cache->append(k, v);
    if (cache->is_compact() && !taps.p) return output(attention_by_windows(q, *cache, spec));
    const KVCache::View stored = cache->window(0, cache->length());
    k = stored.k;
    v = stored.v;
  }
  if (!taps.p) return output(attention(q, k, v, spec));
  return output(
      attention_composed(q, k, v, spec, [&](const Tensor& p) { return on_grid(p, taps.p); }));
}

}  // namespace omq::nn
