// Continuation: sampling, and what becomes of the text on its way out.
#include "models/continuation.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace omq {

Continuation::Continuation(const Tokenizer& tokenizer, std::span<const int32_t> prompt,
                           const GenerateOptions& options, SamplerOptions sampling, int64_t room,
                           GenerateResult& result)
    : tokenizer_(tokenizer),
      options_(options),
      result_(result),
      sampler_(std::move(sampling)),
      // Behind an empty prompt (BOS alone) the text begins here, and SentencePiece's first space is
      // not real.
      decoder_(tokenizer,
               {.start_of_text = prompt.size() == 1 && tokenizer.bos_id() == prompt.front()}),
      filter_(options.stop),
      limit_(options.max_tokens < 0 ? std::numeric_limits<int64_t>::max() : options.max_tokens) {
  result.tokens.reserve(static_cast<size_t>(std::min(limit_, room)));
  history_.reserve(prompt.size() + result.tokens.capacity());
  history_.assign(prompt.begin(), prompt.end());
}

void Continuation::append_numbers(int64_t room, std::vector<double>& numbers) {
  if (sampling().temperature == 0) return;
  const size_t before = numbers.size();
  numbers.resize(before + static_cast<size_t>(std::min(room, limit_)));
  sampler_.take_numbers(std::span(numbers).subspan(before));
}

void Continuation::emit(std::string_view text) {
  if (text.empty()) return;
  if (options_.keep_text) result_.text += text;
  if (options_.on_text) options_.on_text(text);
}

std::optional<FinishReason> Continuation::take(int32_t id, bool ends_text) {
  result_.tokens.push_back(id);
  history_.push_back(id);
  ++result_.stats.generated_tokens;
  if (ends_text) return FinishReason::EndOfText;
  // Ids beyond the tokenizer's (padding of the table) stand for no text.
  if (id < tokenizer_.vocab_size()) emit(filter_.push(decoder_.push(id)));
  if (filter_.met()) return FinishReason::StopString;
  return std::nullopt;
}

void Continuation::finish(FinishReason reason) {
  if (!filter_.met()) emit(filter_.push(decoder_.flush()));
  if (!filter_.met()) emit(filter_.flush());
  result_.finish = filter_.met() ? FinishReason::StopString : reason;
  result_.stop = filter_.found();
}

}  // namespace omq
