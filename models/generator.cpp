// Prefill and decode, of one sequence.
#include "models/generator.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "autograd/ops.h"
#include "models/continuation.h"
#include "tensor/parallel.h"

namespace omq {
namespace detail {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void use_threads(int n) {
  if (n > 0 && n != num_threads()) set_num_threads(n);
}

bool cancelled(const std::atomic<bool>* flag) {
  return flag && flag->load(std::memory_order_relaxed);
}

}  // namespace detail

using detail::cancelled;
using detail::seconds_since;
using detail::use_threads;

std::string_view to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::EndOfText:
      return "end of text";
    case FinishReason::StopString:
      return "stop string";
    case FinishReason::MaxTokens:
      return "token limit";
    case FinishReason::ContextFull:
      return "context full";
    case FinishReason::Cancelled:
      return "cancelled";
  }
  return "?";
}

// ---- StopFilter ----

StopFilter::StopFilter(std::vector<std::string> stop) : stop_(std::move(stop)) {
  std::erase(stop_, std::string());
  size_t longest = 0;
  for (const std::string& s : stop_) longest = std::max(longest, s.size());
  constexpr size_t kUsual = 256;  // bytes of a token's text: rarely more
  held_.reserve(longest + kUsual);
  shown_.reserve(longest + kUsual);
}

std::string_view StopFilter::push(std::string_view text) {
  shown_.clear();
  if (met()) return {};
  held_ += text;
  size_t at = std::string::npos;
  for (const std::string& s : stop_)
    if (const size_t found = held_.find(s); found < at) {
      at = found;
      found_ = s;
    }
  if (met()) {
    shown_.assign(held_, 0, at);
    held_.clear();
    return shown_;
  }
  // The longest end of the text that a stop string begins with.
  size_t keep = 0;
  for (const std::string& s : stop_)
    for (size_t n = std::min(s.size() - 1, held_.size()); n > keep; --n)
      if (std::string_view(held_).ends_with(std::string_view(s).substr(0, n))) {
        keep = n;
        break;
      }
  shown_.assign(held_, 0, held_.size() - keep);
  held_.erase(0, shown_.size());
  return shown_;
}

std::string_view StopFilter::flush() {
  shown_.swap(held_);
  held_.clear();
  return shown_;
}

// ---- Generator ----

Generator::Generator(const Model& model, Tokenizer tokenizer, int64_t context)
    : model_(model),
      tokenizer_(std::move(tokenizer)),
      context_(context > 0 ? context : model.context()) {
  check(context_ <= model.context(),
        "generator: a context of {} tokens is wanted, the model was loaded for {}", context_,
        model.context());
  caches_ = model_.new_caches(1, context_);
  cached_.reserve(static_cast<size_t>(context_));
  unplanned_ = DecodePlan::unsupported(model_);
  if (unplanned_.empty()) plan_.emplace(model_, context_);
}

bool Generator::ends_text(int32_t id) const {
  const auto& declared = model_.config().eos_token_ids;
  return tokenizer_.ends_text(id) ||
         std::find(declared.begin(), declared.end(), id) != declared.end();
}

void Generator::truncate(size_t length) {
  for (nn::KVCache& cache : caches_)
    cache.truncate(std::min(cache.length(), static_cast<int64_t>(length)));
  cached_.resize(std::min(cached_.size(), length));
}

void Generator::reset() { truncate(0); }

std::span<const float> Generator::push(std::span<const int32_t> ids, bool wanted) {
  const auto count = static_cast<int64_t>(ids.size());
  try {
    if (count == 1 && plan_) {
      plan_->step(ids.front(), caches_);
      cached_.push_back(ids.front());
      return wanted ? plan_->logits() : std::span<const float>();
    }
    const Tensor h = model_.forward(Tensor::from<int32_t>(ids, {1, count}),
                                    static_cast<int64_t>(cached_.size()), &caches_);
    cached_.insert(cached_.end(), ids.begin(), ids.end());
    if (wanted)
      logits_ = model_.logits(count == 1 ? h : slice(h, 1, count - 1, count)).to_vector<float>();
    return wanted ? logits_ : std::span<const float>();
  } catch (...) {
    truncate(cached_.size());  // some blocks may have stored what others have not
    throw;
  }
}

int32_t Generator::push_choosing(int32_t id) {
  try {
    const int32_t next = plan_->choose(id, caches_);
    cached_.push_back(id);
    return next;
  } catch (...) {
    truncate(cached_.size());
    throw;
  }
}

Generator::Prefill Generator::prefill(std::span<const int32_t> prompt, int64_t batch,
                                      const std::atomic<bool>* cancel) {
  check(!prompt.empty(), "generate: the prompt is empty");
  check(batch > 0, "generate: a batch of {} tokens", batch);
  const auto vocab = model_.config().vocab_size;
  for (const int32_t id : prompt)
    check(id >= 0 && id < vocab, "generate: token {} is outside the model's vocabulary of {}", id,
          vocab);
  check(static_cast<int64_t>(prompt.size()) <= context_,
        "generate: the prompt has {} tokens, the context holds {}; raise -c or shorten the prompt",
        prompt.size(), context_);
  // The last token always goes through the model: its logits are wanted.
  const auto same =
      std::mismatch(cached_.begin(), cached_.end(), prompt.begin(), prompt.end() - 1).first;
  Prefill result;
  result.reused = same - cached_.begin();
  truncate(static_cast<size_t>(result.reused));
  while (cached_.size() < prompt.size()) {
    if (cancelled(cancel)) return result;
    const auto piece = prompt.subspan(
        cached_.size(), std::min(static_cast<size_t>(batch), prompt.size() - cached_.size()));
    result.logits = push(piece, cached_.size() + piece.size() == prompt.size());
  }
  return result;
}

std::span<const float> Generator::logits_after(std::span<const int32_t> prompt,
                                               const std::atomic<bool>* cancel) {
  const NoGrad off;
  return prefill(prompt, GenerateOptions{}.batch, cancel).logits;
}

std::vector<float> Generator::next_logits(std::span<const int32_t> prompt) {
  const auto logits = logits_after(prompt);
  return {logits.begin(), logits.end()};
}

SamplerOptions Generator::sampling_of(const GenerateOptions& options) const {
  const int64_t vocab = model_.config().vocab_size;
  SamplerOptions sampling = options.sampling;
  sampling.validate(vocab);
  if (options.ignore_eos)
    for (int32_t id = 0; id < std::min(vocab, tokenizer_.vocab_size()); ++id)
      if (ends_text(id))
        sampling.logit_bias.emplace_back(id, -std::numeric_limits<double>::infinity());
  return sampling;
}

bool Generator::choose_by(Continuation& text) {
  if (!plan_ || !plan_->can_choose(text.sampling())) return false;
  const auto at = static_cast<int64_t>(cached_.size());
  std::vector<double> numbers;
  text.append_numbers(context_ - at, numbers);
  plan_->choose_by(text.sampling(), at, numbers);
  return true;
}

FinishReason Generator::decode(std::span<const float> logits, const GenerateOptions& options,
                               Clock::time_point start, Continuation& text,
                               GenerateResult& result) {
  GenerateStats& stats = result.stats;
  bool chosen = false;
  while (text.wants_more()) {
    if (cancelled(options.cancel)) return FinishReason::Cancelled;
    std::optional<int32_t> next;
    if (!result.tokens.empty()) {  // the prompt's logits give the first token
      // Behind the first token, which took the first of the text's numbers.
      if (result.tokens.size() == 1) chosen = choose_by(text);
      if (static_cast<int64_t>(cached_.size()) >= context_) return FinishReason::ContextFull;
      const auto begin = Clock::now();
      if (chosen)
        next = push_choosing(result.tokens.back());
      else
        logits = push({&result.tokens.back(), 1});
      stats.decode_seconds += seconds_since(begin);
      ++stats.decode_steps;
    }
    const int32_t id = next ? *next : text.sample(logits);
    if (result.tokens.empty()) stats.first_token_seconds = seconds_since(start);
    if (const auto end = text.take(id, ends_text(id))) return *end;
  }
  return FinishReason::MaxTokens;
}

GenerateResult Generator::generate(std::span<const int32_t> prompt,
                                   const GenerateOptions& options) {
  const NoGrad off;
  const auto start = Clock::now();
  GenerateResult result;
  options.sampling.validate(model_.config().vocab_size);
  use_threads(options.batch_threads);
  const Prefill prompt_done = prefill(prompt, options.batch, options.cancel);
  GenerateStats& stats = result.stats;
  stats.prompt_tokens = static_cast<int64_t>(prompt.size());
  stats.reused_tokens = prompt_done.reused;
  stats.prompt_seconds = seconds_since(start);
  if (prompt_done.logits.empty()) {
    result.finish = FinishReason::Cancelled;
    return result;
  }
  use_threads(options.threads);
  // The context ends it at the latest, one token behind its last place.
  const int64_t room = context_ - stats.prompt_tokens + 1;
  Continuation text(tokenizer_, prompt, options, sampling_of(options), room, result);
  text.finish(decode(prompt_done.logits, options, start, text, result));
  return result;
}

}  // namespace omq
