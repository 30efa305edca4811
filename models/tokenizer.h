// Tokenizer: text to token ids and back, as the model's own files say.
//
// Two families: byte-level BPE (GPT-2, Llama-3, SmolLM2, Qwen) and SentencePiece-style BPE with
// byte fallback (Llama-1/2, TinyLlama). Sources: a Hugging Face folder (tokenizer.json or
// tokenizer.model), JSON texts in memory, or a plain TokenizerSpec that the GGUF reader fills. Any
// of them can be written out again as tokenizer.json. Text that is not valid UTF-8 is read with
// U+FFFD in place of the bad bytes. Reference: spec/interop-formats.md §5 (GGUF keys), §9
// (tokenizers). Prompt templates: models/chat.h.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace omq {

// The numbers are those of SentencePiece and of `tokenizer.ggml.token_type`.
enum class TokenType : int32_t {
  Normal = 1,
  Unknown = 2,
  Control = 3,
  UserDefined = 4,
  Unused = 5,
  Byte = 6
};

// A tokenizer as plain data; field by field the `tokenizer.ggml.*` keys of GGUF. Empty optionals
// mean "the file has no such key" and take that family's default.
struct TokenizerSpec {
  std::string model;                // "llama" (SentencePiece BPE) or "gpt2" (byte-level BPE)
  std::string pre = "default";      // pre-tokenizer name, "gpt2" only
  std::vector<std::string> tokens;  // [V] pieces: U+2581 for a space, or the GPT-2 byte alphabet
  std::vector<float> scores;        // [V], "llama" only: the higher merges first
  std::vector<int32_t> types;       // [V] or empty: TokenType
  std::vector<std::string> merges;  // "a b" by falling priority, "gpt2" only
  std::optional<int32_t> bos_id, eos_id, eot_id, unk_id, pad_id;
  std::optional<bool> add_bos, add_space_prefix;
  std::string chat_template;  // Jinja text, or empty
};

struct EncodeOptions {
  std::optional<bool> add_bos = {};  // unset: as the model's configuration says
  bool parse_special = true;         // false: the text of control tokens is ordinary text
};

struct DecodeOptions {
  bool skip_special = true;   // drop control tokens such as <s>
  bool start_of_text = true;  // drop the space that SentencePiece puts before the first word
};

struct TokenizerData;  // models/tokenizer_data.h

// An immutable value: copies share their tables, and const calls may run on several threads.
class Tokenizer {
 public:
  // Folder with tokenizer.json (preferred) or tokenizer.model, beside which tokenizer_config.json,
  // chat_template.jinja, generation_config.json and config.json are read where present.
  static Tokenizer from_folder(const std::filesystem::path& folder);
  static Tokenizer from_spec(TokenizerSpec spec);
  // The texts of the files of that name; the last two may be empty. `name` is used in error
  // messages.
  static Tokenizer from_json(std::string tokenizer_json, std::string tokenizer_config_json = {},
                             std::string_view generation_config_json = {},
                             std::string_view name = "tokenizer.json");
  // The bytes of a SentencePiece tokenizer.model (BPE).
  static Tokenizer from_sentencepiece(std::string_view bytes,
                                      std::string tokenizer_config_json = {},
                                      std::string_view name = "tokenizer.model");

  std::vector<int32_t> encode(std::string_view text, EncodeOptions options = {}) const;
  // Valid UTF-8 always: bytes that form no character become U+FFFD. Throws on an id outside the
  // vocabulary.
  std::string decode(std::span<const int32_t> ids, DecodeOptions options = {}) const;
  // The bytes that one token stands for, possibly part of a character; a control token gives its
  // own text.
  std::string token_bytes(int32_t id) const;
  void append_bytes(int32_t id, std::string& out) const;  // the same, behind `out`

  int64_t vocab_size() const;  // highest id + 1
  const std::string& token_piece(
      int32_t id) const;  // as the vocabulary spells it ("Ġthe", "▁the", "<0x0A>")
  std::optional<int32_t> token_id(std::string_view piece) const;
  bool is_special(int32_t id) const;  // control tokens and the unknown token

  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> unk_id() const;
  const std::vector<int32_t>& eos_ids() const;  // as declared, the main one first; may be empty
  // Declared end of sequence, or a control token known to end a turn (<|eot_id|>, <|im_end|>, …).
  bool ends_text(int32_t id) const;
  bool adds_bos() const;                     // what encode() does when add_bos is unset
  bool strips_first_space() const;           // whether start_of_text matters
  const std::string& chat_template() const;  // Jinja text, or empty

  // Files that Hugging Face's libraries read. A tokenizer.json source comes back byte for byte; so
  // does a tokenizer_config.json unless its template came from a file of its own, which is then put
  // inside.
  std::string to_tokenizer_json() const;
  std::string to_tokenizer_config_json() const;
  std::string to_generation_config_json()
      const;  // bos_token_id and eos_token_id (a list if several)

 private:
  explicit Tokenizer(std::shared_ptr<const TokenizerData> data);
  std::shared_ptr<const TokenizerData> data_;
};

// Decodes token by token for printing: whole characters come out as soon as they are complete, the
// first bytes of an unfinished one wait. The concatenation of all results equals decode() of all
// ids.
class StreamDecoder {
 public:
  // start_of_text false when the tokens continue a prompt: their first space is then real.
  explicit StreamDecoder(Tokenizer tokenizer, DecodeOptions options = {.start_of_text = false});
  // The text is valid until the next call.
  const std::string& push(int32_t id);
  const std::string& flush();  // what still waits, as U+FFFD; then starts anew

 private:
  Tokenizer tokenizer_;
  DecodeOptions options_;
  std::string pending_, text_;
  bool at_start_;
};

}  // namespace omq
