// Generator: a prompt in, text out, token by token.
//
// The prompt goes through the model in batches, then each token alone over the key/value cache.
// What the cache already holds of a new prompt's beginning is not computed again, so a chat turn
// costs only what is new. Text leaves as whole UTF-8 characters, and never with any part of a stop
// string. Single tokens run the DecodePlan where it supports the model, else the blocks; then a
// generated token allocates nothing. Several continuations of one prompt are made together, for
// weights are read once for all of them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/decode_plan.h"
#include "models/model.h"
#include "models/sampler.h"
#include "models/tokenizer.h"
#include "nn/kv_cache.h"

namespace omq {

enum class FinishReason { EndOfText, StopString, MaxTokens, ContextFull, Cancelled };
std::string_view to_string(FinishReason reason);  // "end of text", "stop string", …

struct GenerateOptions {
  SamplerOptions sampling;
  int64_t max_tokens = -1;             // −1: until the model ends the text or the context is full
  std::vector<std::string> stop;       // text ends before any of these
  bool ignore_eos = false;             // tokens that end the text are forbidden
  int threads = 0, batch_threads = 0;  // for single tokens and for the prompt; 0: as they are
  int64_t batch = 512;                 // prompt tokens at a time
  std::function<void(std::string_view text)> on_text;  // each new piece as soon as it is certain
  bool keep_text = true;  // false: GenerateResult::text stays empty, on_text has it all
  const std::atomic<bool>* cancel =
      nullptr;  // ends the work at the next token when it becomes true
};

struct GenerateStats {
  int64_t prompt_tokens = 0, reused_tokens = 0;  // of the prompt, and found in the cache
  int64_t generated_tokens = 0;                  // the one that ended the text counts
  int64_t decode_steps = 0;                      // passes of one token
  // decode_seconds: in the model; without sampling, but by a GPU.
  double prompt_seconds = 0, first_token_seconds = 0, decode_seconds = 0;
  double prompt_rate() const {
    return rate(prompt_tokens - reused_tokens, prompt_seconds);
  }                                                                          // tokens/s
  double decode_rate() const { return rate(decode_steps, decode_seconds); }  // tokens/s

 private:
  static double rate(int64_t n, double s) { return s > 0 ? static_cast<double>(n) / s : 0.0; }
};

struct GenerateResult {
  std::string text;             // all that on_text was given, if it was to be kept
  std::vector<int32_t> tokens;  // as sampled, with the one that ended the text
  FinishReason finish = FinishReason::MaxTokens;
  std::string stop;  // the stop string that was met
  GenerateStats stats;
};

class Continuation;  // models/continuation.h

class Generator {
 public:
  // context: tokens that prompt and answer may hold together, at most model.context() (0: that).
  // `model` must outlive the generator.
  Generator(const Model& model, Tokenizer tokenizer, int64_t context = 0);

  // Throws Error when the prompt is empty, holds an unknown id, or leaves no room in the context.
  GenerateResult generate(std::span<const int32_t> prompt, const GenerateOptions& options);
  // `count` continuations of one prompt, 1 to DecodePlan::kMaxBatch: number i is sampled with
  // seed + i, and on the CPU, where a plan runs the model, is what generate() makes with that seed.
  // The prompt goes through the model once; each sequence has a cache of its own, and one that has
  // ended waits for the others. The texts are in the results: on_text is not called. Where no plan
  // runs the model, its blocks take the sequences together. Throws Error as generate() does, and
  // for another count.
  std::vector<GenerateResult> generate_parallel(std::span<const int32_t> prompt, int64_t count,
                                                const GenerateOptions& options);
  // Logits [V] of the token after `prompt`; the cache is used and kept as above.
  std::vector<float> next_logits(std::span<const int32_t> prompt);
  // The same without a copy: valid until the next call; empty when cancelled.
  std::span<const float> logits_after(std::span<const int32_t> prompt,
                                      const std::atomic<bool>* cancel = nullptr);
  // Forgets everything.
  void reset();
  // Why single tokens run through the blocks and not through the DecodePlan; "" when they do not.
  const std::string& unplanned() const { return unplanned_; }

  int64_t context() const { return context_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  bool ends_text(int32_t id) const;

 private:
  // Puts ids behind the cached tokens; with `wanted` gives the logits of the token after the last.
  std::span<const float> push(std::span<const int32_t> ids, bool wanted = true);
  // The same of one token with a plan, which chooses the next one.
  int32_t push_choosing(int32_t id);
  // Whether the plan can choose the tokens from here on as the text is sampled; has it do so.
  bool choose_by(Continuation& text);
  struct Prefill {
    std::span<const float> logits;  // empty when cancelled
    int64_t reused = 0;             // tokens found in the cache
  };
  Prefill prefill(std::span<const int32_t> prompt, int64_t batch, const std::atomic<bool>* cancel);
  using Clock = std::chrono::steady_clock;
  // Samples until there is a reason to end. logits: behind the prompt.
  FinishReason decode(std::span<const float> logits, const GenerateOptions& options,
                      Clock::time_point start, Continuation& text, GenerateResult& result);
  // The options as the sampler wants them.
  SamplerOptions sampling_of(const GenerateOptions& options) const;
  void truncate(size_t length);

  const Model& model_;
  Tokenizer tokenizer_;
  int64_t context_;
  std::vector<nn::KVCache> caches_;
  std::vector<int32_t> cached_;  // the tokens that the caches hold
  std::optional<DecodePlan> plan_;
  std::string unplanned_;
  std::vector<float> logits_;  // [V], of the blocks
};

// Holds text back as long as it may turn out to be the beginning of a stop string.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stop);
  // Text that can be shown now, valid until the next call. After a stop string was met: nothing
  // more.
  std::string_view push(std::string_view text);
  std::string_view flush();  // what was held back, at the end
  bool met() const { return !found_.empty(); }
  const std::string& found() const { return found_; }

 private:
  std::vector<std::string> stop_;
  std::string held_, shown_, found_;
};

}  // namespace omq
