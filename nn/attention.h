// Grouped-query attention with rotary positions, an optional q/k norm (Qwen3), and its own head
// size.
#pragma once

#include <optional>

#include "nn/kv_cache.h"
#include "nn/linear.h"
#include "nn/norm.h"
#include "nn/rope.h"

namespace omq::nn {

// Where this call's tokens stand: I32 [T], and the tables that turn a position into a rotation.
struct Positions {
  Tensor index;
  RopeTables tables;
};
// Positions first, first + 1, … of `count` tokens.
Positions positions(int64_t first, int64_t count, const RopeTables& tables);

struct Attention {
  Linear q_proj, k_proj, v_proj, o_proj;  // [H·d, D], [K·d, D], [K·d, D], [D, H·d]
  std::optional<RMSNorm> q_norm, k_norm;  // over d, before the rotation
  int64_t heads = 0, kv_heads = 0, head_dim = 0;

  // What is quantised on the way, each row on its own grid; none: nothing. q, k, v [B,T,heads,d]
  // after the rotation, a row being one token's head; p: the probabilities [B,H,T,S], a row being
  // one query's, which only the composed attention forms. A cache that keeps k or v on the same
  // grid does it there. Before that, q_online and k_online transform each head of q and k; they
  // leave every product of a query with a key as it is.
  struct Taps {
    std::optional<RowQuant> q, k, v, p;
    std::optional<Kronecker> q_online = {}, k_online = {};
  } taps;

  Tensor operator()(const Tensor& x, const Positions& at,
                    KVCache* cache) const;  // [B,T,D] → [B,T,D]
};

}  // namespace omq::nn
