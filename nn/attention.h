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

  // Applied on the way; what quantises activations hooks in here. q, k, v [B,T,heads,d] after the
  // rotation and before the cache, a row being one token's head; p: the probabilities [B,H,T,S],
  // which only the composed attention forms.
  struct Taps {
    std::function<Tensor(const Tensor&)> q, k, v, p;
  } taps;

  Tensor operator()(const Tensor& x, const Positions& at,
                    KVCache* cache) const;  // [B,T,D] → [B,T,D]
};

}  // namespace omq::nn
