// DecodePlan: what every executor of it checks first.
#include "models/decode_plan.h"

#include <algorithm>
#include <utility>

#include "models/decode_plan_impl.h"
#include "tensor/decode_kernels.h"

namespace omq {
namespace {

std::string unsupported_weight(const nn::Weight& weight) {
  if (const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&weight)) {
    const auto* w = dynamic_cast<const nn::PackedIntWeight*>(packed->get());
    return w ? "" : "a packed weight that is not of integer codes";
  }
  const Tensor& dense = std::get<Tensor>(weight);
  const DType t = dense.dtype();
  if (t != DType::F32 && t != DType::BF16 && t != DType::F16)
    return fmt::format("a dense weight of {}", dtype_name(t));
  return dense.is_contiguous() ? "" : "a dense weight that is not contiguous";
}

bool share_input(const LlamaBlock& b) {
  const nn::Attention& a = b.self_attn;
  return a.q_proj.input_quant == a.k_proj.input_quant &&
         a.q_proj.input_quant == a.v_proj.input_quant &&
         b.mlp.gate_proj.input_quant == b.mlp.up_proj.input_quant;
}

}  // namespace

RowMatrix row_matrix(const nn::Linear& l) {
  if (const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&l.weight))
    return {dynamic_cast<const nn::PackedIntWeight&>(**packed).packed(), l.bias};
  return {std::get<Tensor>(l.weight).detach(), l.bias};
}

std::string DecodePlan::unsupported(const Model& model) {
  std::string reason = unsupported_weight(model.ends.embed_tokens.table);
  if (reason.empty()) reason = unsupported_weight(model.ends.lm_head.weight);
  for (const auto& block : model.blocks) {
    if (!reason.empty()) break;
    const nn::Attention::Taps& taps = block->self_attn.taps;
    if (taps.p) return "attention probabilities are quantised (p_bits)";
    if (taps.q_online || taps.k_online) return "queries and keys are transformed";
    if (!share_input(*block)) return "inputs that matrices share are quantised differently";
    for (const auto& [name, linear] : block->linears()) {
      if (linear->pre || linear->online) return fmt::format("the input of {} is transformed", name);
      if (reason.empty()) reason = unsupported_weight(linear->weight);
    }
  }
  if (reason.empty() && model.device().type != DeviceType::CPU)
    reason = device_plan_unsupported(model);
  return reason;
}

DecodePlan::DecodePlan(const Model& model, int64_t capacity, int64_t batch)
    : vocabulary_(model.config().vocab_size),
      blocks_(model.blocks.size()),
      context_(model.context()),
      capacity_(capacity),
      batch_(batch) {
  check(batch >= 1 && batch <= kMaxBatch, "decode plan: {} sequences at once, 1 to {} are possible",
        batch, kMaxBatch);
  const std::string reason = unsupported(model);
  check(reason.empty(), "decode plan: {}; run the blocks instead", reason);
  chosen_.resize(static_cast<size_t>(batch));
  next_.resize(static_cast<size_t>(batch));
  impl_ = model.device().type == DeviceType::CPU ? cpu_decode_plan(model, capacity, batch)
                                                 : device_decode_plan(model, capacity, batch);
}
DecodePlan::~DecodePlan() = default;
DecodePlan::DecodePlan(DecodePlan&&) noexcept = default;

int64_t DecodePlan::check_step(std::span<const int32_t> tokens,
                               const std::vector<nn::KVCache>& caches) const {
  check(caches.size() == blocks_ && !caches.empty(), "decode: {} caches for {} blocks",
        caches.size(), blocks_);
  const int64_t at = caches.front().length();
  for (const nn::KVCache& cache : caches) {
    check(cache.batch() == batch_, "decode: caches of {} sequences, the plan was made for {}",
          cache.batch(), batch_);
    check(cache.length() == at, "decode: caches of {} and of {} tokens", at, cache.length());
  }
  check(caches.front().capacity() <= capacity_,
        "decode: caches of {} tokens, the plan was made for {}", caches.front().capacity(),
        capacity_);
  check(at < caches.front().capacity() && at < context_,
        "context is full: {} tokens cached, 1 more wanted, room for {}", at,
        std::min(caches.front().capacity(), context_));
  check(static_cast<int64_t>(tokens.size()) == batch_, "decode: {} tokens for {} sequences",
        tokens.size(), batch_);
  for (const int32_t token : tokens)
    check(token >= 0 && token < vocabulary_,
          "decode: token {} is outside the model's vocabulary of {}", token, vocabulary_);
  return at;
}

void DecodePlan::step(std::span<const int32_t> tokens, std::vector<nn::KVCache>& caches) {
  impl_->step(tokens, check_step(tokens, caches), caches);
}

std::span<const int32_t> DecodePlan::choose(std::span<const int32_t> tokens,
                                            std::vector<nn::KVCache>& caches) {
  const int64_t at = check_step(tokens, caches);
  impl_->choose(tokens, at, caches, next_);
  for (size_t i = 0; i < next_.size(); ++i) {
    if (next_[i] >= 0) continue;
    for (nn::KVCache& cache : caches) cache.truncate(at);
    check(next_[i] != kChosenNothing, "sampling: every token is forbidden; see --logit-bias");
    fail("decode: a logit behind token {} at position {} is NaN", tokens[i], at);
  }
  std::swap(chosen_, next_);
  return chosen_;
}

bool DecodePlan::can_choose(const SamplerOptions& sampling) const {
  return impl_->can_choose(sampling);
}

void DecodePlan::choose_by(const SamplerOptions& sampling, int64_t at,
                           std::span<const double> numbers) {
  check(can_choose(sampling), "decode: the plan cannot choose tokens in this way");
  sampling.validate(vocabulary_);
  check(at >= 0 && static_cast<int64_t>(numbers.size()) % batch_ == 0,
        "decode: {} numbers for {} sequences from position {}", numbers.size(), batch_, at);
  impl_->choose_by(sampling, at, numbers);
}

std::span<const float> DecodePlan::logits() { return impl_->logits(); }

}  // namespace omq
