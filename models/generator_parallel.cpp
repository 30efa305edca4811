// Several continuations of one prompt, all of them a token further in every step.
#include <algorithm>

#include "autograd/ops.h"
#include "models/continuation.h"
#include "tensor/parallel.h"

namespace omq {

using detail::cancelled;
using detail::seconds_since;
using detail::use_threads;

namespace {

// Tokens 0 … count − 1 of the only sequence of `one` [1, capacity, …], to every sequence of `all`.
void copy_tokens(const Tensor& one, const Tensor& all, int64_t count) {
  if (!one.defined()) return;
  const Device device = one.device();
  const size_t token = one.nbytes() / static_cast<size_t>(one.dim(1)),
               sequence = token * static_cast<size_t>(all.dim(1));
  for (int64_t i = 0; i < all.dim(0); ++i)
    device_api(device).copy(static_cast<char*>(all.raw()) + static_cast<size_t>(i) * sequence,
                            device, one.raw(), device, token * static_cast<size_t>(count));
}

void copy_tokens(const nn::KVCache::Store& one, const nn::KVCache::Store& all, int64_t count) {
  copy_tokens(one.floats, all.floats, count);
  copy_tokens(one.codes.codes, all.codes.codes, count);
  copy_tokens(one.codes.grid, all.codes.grid, count);
}

// The texts, each with its own end.
class Texts {
 public:
  Texts(std::vector<GenerateResult>& results, GenerateStats stats) : results_(results) {
    for (GenerateResult& r : results_) r.stats = stats;
    texts_.reserve(results.size());
    open_.assign(results.size(), true);
    left_ = results.size();
  }
  void add(Continuation text) { texts_.push_back(std::move(text)); }
  Continuation& operator[](size_t i) { return texts_[i]; }
  bool open(size_t i) const { return open_[i]; }
  bool any_open() const { return left_ > 0; }

  void take(size_t i, int32_t id, bool ends_text) {
    if (const auto reason = texts_[i].take(id, ends_text))
      end(i, *reason);
    else
      end_at_limit(i);
  }
  void end_at_limit(size_t i) {
    if (!texts_[i].wants_more()) end(i, FinishReason::MaxTokens);
  }
  void end_all(FinishReason reason) {
    for (size_t i = 0; i < texts_.size(); ++i)
      if (open_[i]) end(i, reason);
  }

 private:
  void end(size_t i, FinishReason reason) {
    texts_[i].finish(reason);
    open_[i] = false;
    --left_;
  }
  std::vector<GenerateResult>& results_;
  std::vector<Continuation> texts_;
  std::vector<bool> open_;
  size_t left_;
};

// The model and a cache for each of some sequences.
class Sequences {
 public:
  // prompt: the caches of one sequence, whose first `length` tokens all of these begin with.
  Sequences(const Model& model, const std::vector<nn::KVCache>& prompt, int64_t length,
            int64_t count, int64_t capacity, bool planned)
      : model_(model), count_(count), length_(length), caches_(model.new_caches(count, capacity)) {
    for (size_t i = 0; i < caches_.size(); ++i) {
      copy_tokens(prompt[i].keys(), caches_[i].keys(), length);
      copy_tokens(prompt[i].values(), caches_[i].values(), length);
      caches_[i].advance(length);
    }
    if (planned) plan_.emplace(model, capacity, count);
  }
  int64_t length() const { return length_; }

  // A token behind each sequence. Logits [count, V] of the next ones, valid until the next call.
  std::span<const float> push(std::span<const int32_t> tokens) {
    const int64_t at = length_++;
    if (plan_) {
      plan_->step(tokens, caches_);
      return plan_->logits();
    }
    const Tensor ids = Tensor::from<int32_t>(tokens, {count_, 1});
    logits_ = model_.logits(model_.forward(ids, at, &caches_)).to_vector<float>();
    return logits_;
  }
  // The same with a plan, which chooses the next ones.
  std::span<const int32_t> push_choosing(std::span<const int32_t> tokens) {
    ++length_;
    return plan_->choose(tokens, caches_);
  }
  // Whether a plan can choose as the texts are sampled; has it do so.
  bool choose_by(Texts& texts) {
    const SamplerOptions& sampling = texts[0].sampling();
    if (!plan_ || !plan_->can_choose(sampling)) return false;
    std::vector<double> numbers;
    for (int64_t i = 0; i < count_; ++i)
      texts[static_cast<size_t>(i)].append_numbers(caches_.front().capacity() - length_, numbers);
    plan_->choose_by(sampling, length_, numbers);
    return true;
  }

 private:
  const Model& model_;
  int64_t count_, length_;
  std::vector<nn::KVCache> caches_;
  std::optional<DecodePlan> plan_;
  std::vector<float> logits_;  // of the blocks
};

}  // namespace

std::vector<GenerateResult> Generator::generate_parallel(std::span<const int32_t> prompt,
                                                         int64_t count,
                                                         const GenerateOptions& given) {
  const NoGrad off;
  const auto start = Clock::now();
  check(count >= 1 && count <= DecodePlan::kMaxBatch,
        "generate: {} continuations at once, 1 to {} are possible", count, DecodePlan::kMaxBatch);
  GenerateOptions options = given;
  options.on_text = nullptr;  // they would run into each other
  options.keep_text = true;
  SamplerOptions sampling = sampling_of(options);
  use_threads(options.batch_threads);
  const Prefill prompt_done = prefill(prompt, options.batch, options.cancel);
  const auto length = static_cast<int64_t>(prompt.size());
  GenerateStats stats;
  stats.prompt_tokens = length;
  stats.reused_tokens = prompt_done.reused;
  stats.prompt_seconds = seconds_since(start);
  std::vector<GenerateResult> results(static_cast<size_t>(count));
  Texts texts(results, stats);
  const int64_t room = context_ - length + 1;
  for (GenerateResult& result : results) {
    texts.add({tokenizer_, prompt, options, sampling, room, result});
    ++sampling.seed;
  }
  if (prompt_done.logits.empty() || cancelled(options.cancel)) {
    texts.end_all(FinishReason::Cancelled);
    return results;
  }
  use_threads(options.threads);
  std::vector<int32_t> tokens(results.size()), next(results.size());  // the last of each
  const auto take = [&](size_t i, int32_t id) {
    tokens[i] = id;
    if (results[i].tokens.empty()) results[i].stats.first_token_seconds = seconds_since(start);
    texts.take(i, id, ends_text(id));
  };
  for (size_t i = 0; i < results.size(); ++i) {
    texts.end_at_limit(i);
    if (texts.open(i)) take(i, texts[i].sample(prompt_done.logits));
  }
  if (!texts.any_open()) return results;
  // No more places than the longest text can need: each sequence takes them.
  const int64_t wanted = options.max_tokens < 0 ? room : std::min(room, options.max_tokens);
  Sequences sequences(model_, caches_, length, count, std::min(context_, length + wanted),
                      plan_.has_value());
  const bool chosen = sequences.choose_by(texts);
  const auto V = static_cast<size_t>(model_.config().vocab_size);
  double seconds = 0;
  while (texts.any_open()) {
    if (cancelled(options.cancel))
      texts.end_all(FinishReason::Cancelled);
    else if (sequences.length() >= context_)
      texts.end_all(FinishReason::ContextFull);
    if (!texts.any_open()) break;
    const auto begin = Clock::now();
    std::span<const float> logits;
    std::span<const int32_t> choice;
    if (chosen)
      choice = sequences.push_choosing(tokens);
    else
      logits = sequences.push(tokens);
    seconds += seconds_since(begin);
    // Sampling looks at all of a row, which on the host takes longer than a step on a GPU.
    if (!chosen)
      parallel_for(count, 1, [&](int64_t first, int64_t last) {
        for (auto i = static_cast<size_t>(first); i < static_cast<size_t>(last); ++i)
          if (texts.open(i)) next[i] = texts[i].sample(logits.subspan(i * V, V));
      });
    for (size_t i = 0; i < results.size(); ++i) {
      // What has ended goes on with what was chosen: so a step that was begun ahead stays right.
      if (chosen) tokens[i] = next[i] = choice[i];
      if (!texts.open(i)) continue;
      results[i].stats.decode_seconds = seconds;
      ++results[i].stats.decode_steps;
      take(i, next[i]);
    }
  }
  return results;
}

}  // namespace omq
