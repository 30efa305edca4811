// One continuation of a prompt on its way: tokens are sampled, and become text that leaves as whole
// UTF-8 characters and never with any part of a stop string (internal to the generator).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "models/generator.h"
#include "models/sampler.h"

namespace omq {

class Continuation {
 public:
  // Writes into `result`, which must outlive it. room: the most tokens that can be made, for whose
  // sake no memory is taken later. sampling: options.sampling as the generator completes it.
  Continuation(const Tokenizer& tokenizer, std::span<const int32_t> prompt,
               const GenerateOptions& options, SamplerOptions sampling, int64_t room,
               GenerateResult& result);

  const SamplerOptions& sampling() const { return sampler_.options(); }
  // Appends the numbers that its next tokens are to be drawn by, if any are: for as many as `room`
  // and its limit allow.
  void append_numbers(int64_t room, std::vector<double>& numbers);
  // Whether a token more is wanted; else the limit is reached.
  bool wants_more() const { return static_cast<int64_t>(result_.tokens.size()) < limit_; }
  int32_t sample(std::span<const float> logits) { return sampler_.sample(logits, history_); }
  // Takes a token, which ends the text where the model says so; gives the reason to end, if any.
  std::optional<FinishReason> take(int32_t id, bool ends_text);
  // Lets out the text that was held back, and notes the reason to end.
  void finish(FinishReason reason);

 private:
  void emit(std::string_view text);

  const Tokenizer& tokenizer_;
  const GenerateOptions& options_;
  GenerateResult& result_;
  Sampler sampler_;
  StreamDecoder decoder_;
  StopFilter filter_;
  int64_t limit_;
  std::vector<int32_t> history_;  // prompt and tokens
};

namespace detail {

double seconds_since(std::chrono::steady_clock::time_point start);
void use_threads(int n);  // 0: as they are
bool cancelled(const std::atomic<bool>* flag);

}  // namespace detail
}  // namespace omq
