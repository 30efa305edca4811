// DecodePlan: one token through all layers of a model, in fixed buffers (ARCHITECTURE §8); or one
// of each of several sequences that are equally long, for the price of little more than one,
// because weights are read once for all of them.
//
// Five stages a layer: [norm, q, k, v] → [rotation, cache, attention] → [o + residual] → [norm,
// gate, up, SiLU ⊙] → [down + residual]; then norm and head. On the CPU a stage is one dispatch of
// the pool (tensor/row_products.h), on a GPU one kernel (products one for every few sequences), and
// all of them are one recording that is replayed (tensor/decode_kernels.h). All memory is taken
// when the plan is made: a step allocates nothing, and records only when it is the first one of its
// kind or for new caches. The blocks (models/llama.h) are its definition; the tests hold the two
// equal.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/model.h"
#include "models/sampler.h"
#include "nn/kv_cache.h"

namespace omq {

class DecodePlan {
 public:
  // Why the plan cannot run this model, whose blocks then must: "" when it can. What it cannot:
  // weights of an unknown form, quantised probabilities (p_bits), transformed inputs.
  static std::string unsupported(const Model& model);
  static bool supports(const Model& model) { return unsupported(model).empty(); }

  static constexpr int64_t kMaxBatch = 16;

  // capacity: the most tokens of the caches. batch: B sequences, 1 to kMaxBatch. Shares the weights
  // of the model, which must outlive the plan; takes the instruction set in use now. Throws Error
  // when the model is not supported.
  DecodePlan(const Model& model, int64_t capacity, int64_t batch = 1);
  ~DecodePlan();
  DecodePlan(DecodePlan&&) noexcept;
  int64_t batch() const { return batch_; }

  // Puts a token of each sequence behind what the caches (one a block, each of B sequences) hold.
  // Hidden states after the final norm stay in the plan; logits() multiplies them. Throws Error
  // when a token is unknown or the caches are full, of different lengths, or not as the model's.
  void step(std::span<const int32_t> tokens, std::vector<nn::KVCache>& caches);
  // Of the tokens after the last step(): [B, V], valid until the next call. Behind choose() they
  // may be those of the step that was begun ahead.
  std::span<const float> logits();
  // step(), and for each sequence the token that follows: the one of the largest logit, the lowest
  // id among equals, or as choose_by() says. Valid until the call after the next, so that they may
  // be its tokens. A GPU chooses by itself and has begun the step of these ids when this returns,
  // so that it does not wait for the host; what it writes into the caches counts only when that
  // step is asked for. Throws Error when a logit is NaN, or when every token is forbidden; the
  // caches are as before then.
  std::span<const int32_t> choose(std::span<const int32_t> tokens,
                                  std::vector<nn::KVCache>& caches);
  // Whether choose() can choose so: on a CPU where the largest logit is taken as it is; on a GPU
  // where nothing is penalised and top-k keeps few (kDecodeMostTopK).
  bool can_choose(const SamplerOptions& sampling) const;
  // It does from now on; can_choose() holds. numbers [B, n]: sequence b draws the token behind
  // position at + i by numbers[b][i], and none are asked for beyond. The ids are those of a Sampler
  // with these numbers, unless one falls between two tokens by less than rounding: biased logits
  // are F32 here, and logits() behind choose() gives them so. Throws Error when an option is out of
  // range.
  void choose_by(const SamplerOptions& sampling, int64_t at, std::span<const double> numbers);

  // The same of one sequence.
  void step(int32_t token, std::vector<nn::KVCache>& caches) { step({&token, 1}, caches); }
  int32_t choose(int32_t token, std::vector<nn::KVCache>& caches) {
    return choose({&token, 1}, caches).front();
  }

  struct Impl;

 private:
  int64_t check_step(std::span<const int32_t> tokens, const std::vector<nn::KVCache>& caches) const;

  int64_t vocabulary_;
  size_t blocks_;
  int64_t context_, capacity_, batch_;
  std::vector<int32_t> chosen_, next_;  // [B]: by the last choose(), and by the one under way
  std::unique_ptr<Impl> impl_;
};

}  // namespace omq
