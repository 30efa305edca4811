// DecodePlan: one token through all layers of a model, in fixed buffers (ARCHITECTURE §8).
//
// Five stages a layer: [norm, q, k, v] → [rotation, cache, attention] → [o + residual] → [norm,
// gate, up, SiLU ⊙] → [down + residual]; then norm and head. On the CPU a stage is one dispatch of
// the pool (tensor/row_products.h), on a GPU one kernel, and all of them are one recording that is
// replayed (tensor/decode_kernels.h). All memory is taken when the plan is made: a step records
// nothing and allocates nothing. The blocks (models/llama.h) are its definition; the tests hold the
// two equal.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/model.h"
#include "nn/kv_cache.h"

namespace omq {

class DecodePlan {
 public:
  // Why the plan cannot run this model, whose blocks then must: "" when it can. What it cannot:
  // weights of an unknown form, quantised probabilities (p_bits), transformed inputs.
  static std::string unsupported(const Model& model);
  static bool supports(const Model& model) { return unsupported(model).empty(); }

  // capacity: the most tokens of the caches. Shares the weights of the model, which must outlive
  // the plan; takes the instruction set in use now. Throws Error when the model is not supported.
  DecodePlan(const Model& model, int64_t capacity);
  ~DecodePlan();
  DecodePlan(DecodePlan&&) noexcept;

  // Puts `token` behind what the caches (one a block, of one sequence) hold. Hidden states after
  // the final norm stay in the plan; logits() multiplies them. Throws Error when the token is
  // unknown or the caches are full or not as the model's.
  void step(int32_t token, std::vector<nn::KVCache>& caches);
  // Of the token after the last step(): [V], valid until the next call. Behind greedy() they may be
  // those of the step that was begun ahead.
  std::span<const float> logits();
  // step(), and the id of the largest logit behind it, the lowest among equals. A GPU chooses by
  // itself and has begun the step of that id when this returns, so that it does not wait for the
  // host; what it writes into the caches counts only when that step is asked for. Throws Error when
  // a logit is NaN; the caches are as before then.
  int32_t greedy(int32_t token, std::vector<nn::KVCache>& caches);

  struct Impl;

 private:
  int64_t check_step(int32_t token, const std::vector<nn::KVCache>& caches) const;

  int64_t vocabulary_;
  size_t blocks_;
  int64_t context_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace omq
