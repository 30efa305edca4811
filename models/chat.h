// Chat: a conversation as the prompt text that a model was tuned on.
//
// Models carry their prompt format as a Jinja program. We do not run Jinja: four formats are
// recognised in that text and rendered natively, to the same string (with add_generation_prompt),
// including the details that vary between templates of one format (default system prompt, trimming,
// BOS). A template that is none of them is an error, never a guess. Reference: the model's
// tokenizer_config.json `chat_template`.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "models/tokenizer.h"

namespace omq {

struct Message {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

enum class ChatFormat { ChatML, Llama2, Llama3, Zephyr };

class ChatTemplate {
 public:
  // Throws when the text is none of the known formats; the message names --chat-template.
  static ChatTemplate recognise(std::string_view jinja, std::string bos, std::string eos);
  // "chatml", "llama2", "llama3" or "zephyr" in their plain form; throws on another name.
  static ChatTemplate named(std::string_view name, std::string bos, std::string eos);
  // By name when it is not empty, else from the tokenizer's own template.
  static ChatTemplate of(const Tokenizer& tokenizer, std::string_view name = {});

  // The prompt, ending where the assistant's answer begins. It contains the BOS token where the
  // format has one: encode it with add_bos = false and parse_special = true. Throws on roles the
  // format cannot express.
  std::string render(const std::vector<Message>& messages) const;

  ChatFormat format() const { return format_; }
  std::string_view name() const;

 private:
  ChatTemplate(ChatFormat format, std::string bos, std::string eos)
      : format_(format), bos_(std::move(bos)), eos_(std::move(eos)) {}
  void recognise_chatml(std::string_view jinja);
  void recognise_llama2(std::string_view jinja);
  void recognise_llama3(std::string_view jinja);
  void recognise_zephyr(std::string_view jinja);
  std::string render_chatml(const std::vector<Message>& messages) const;
  std::string render_llama2(const std::vector<Message>& messages) const;
  std::string render_llama3(const std::vector<Message>& messages) const;
  std::string render_zephyr(const std::vector<Message>& messages) const;

  ChatFormat format_;
  std::string bos_, eos_;
  std::string default_system_;  // spoken for when the conversation has no system message
  std::string prompt_;          // what opens the answer
  std::string turn_end_;        // what follows a message
  std::string date_;   // Llama-3.1: the date line, with which it always writes a system message
  bool trim_ = false;  // white space around every message is dropped
  bool strip_thoughts_ = false;  // of earlier answers, what precedes </think> (Qwen3)
};

}  // namespace omq
