// The inside of a Tokenizer, shared by its readers, its two BPE engines and its writer.
//
// Readers (tokenizer_json.cpp, tokenizer_spec.cpp, tokenizer_protobuf.cpp) fill a TokenizerData;
// finish() checks it and builds the tables; bpe_bytes.cpp and bpe_sentencepiece.cpp encode a piece
// of text with it. Not included outside models/tokenizer_*, models/bpe_*.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "models/bpe_merges.h"
#include "models/pretokenizer.h"
#include "models/tokenizer.h"
#include "models/tokenizer_utf8.h"

namespace omq {

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
template <class V>
using StringMap = std::unordered_map<std::string, V, StringHash, std::equal_to<>>;

// A token found by its literal text before BPE sees anything (tokenizer.json `added_tokens`).
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;                 // a control token: not matched when parse_special is off
  bool lstrip = false, rstrip = false;  // swallows the white space beside it
  bool single_word = false;             // only where no word character touches it
};

// One step of the byte-level family's pre-tokenizer, applied to every piece of the step before.
struct SplitStep {
  std::shared_ptr<const Pattern> pattern;  // null: no cutting
  bool keep_gaps = true;                   // text between matches is a piece too
  bool prefix_space = false;               // a piece that starts without a space gets one
};

// Where the SentencePiece family writes a word mark (U+2581) that the text does not have.
enum class WordMark { None, Always, UnlessPresent, FirstUnlessPresent };

struct Merge {
  int32_t left, right, result;
};

struct TokenizerData {
  // ---- what the readers fill
  std::string name;                 // for messages
  bool byte_level = true;           // family
  std::vector<std::string> pieces;  // [V] empty string: no such token
  std::vector<TokenType> types;     // [V]
  std::vector<float> scores;        // [V] or empty
  std::vector<Merge> merges;        // by falling priority
  std::vector<uint32_t> ranks;      // [merges] priorities; empty: the index
  std::vector<AddedToken> added;
  std::vector<SplitStep> steps;         // byte level
  bool ignore_merges = false;           // a piece that is itself a token is taken whole
  bool normalize_nfc = false;           // Unicode composition first (Qwen)
  WordMark word_mark = WordMark::None;  // SentencePiece from here on
  bool split_words = false;             // BPE word by word instead of over the whole text
  bool strip_first_space = false;       // decoding drops the mark of the first word
  bool byte_fallback = false;
  bool fuse_unk = false;
  std::optional<int32_t> bos, unk, pad;
  std::vector<int32_t> eos;
  bool add_bos = false;
  std::string chat_template;
  std::string tokenizer_json, tokenizer_config_json;  // the source's own texts, or empty
  std::string pre;                                    // GGUF pre-tokenizer name, or empty

  int64_t id_limit = 0;  // what a hostile file may make us allocate

  // ---- what finish() builds
  StringMap<int32_t> ids;  // piece → id
  MergeTable merge_table;
  std::array<int32_t, 256> byte_ids{};  // token of a single byte, or −1
  std::array<std::vector<uint32_t>, 256>
      added_by_first;               // indices into added by first byte, longest first
  StringMap<int32_t> whole_pieces;  // bytes → id, with ignore_merges only
  bool words_independent = false;   // no merge crosses into a word mark: words can be cached

  // Gives `id` its piece, growing the vocabulary; rejects ids outside [0, id_limit) and twice-given
  // ones.
  void set_piece(int64_t id, std::string piece, TokenType type);
  // Builds ids from pieces: readers need it before merges and special tokens.
  void index_pieces();
  void finish();
  std::optional<int32_t> id_of(std::string_view piece) const;

  // Byte level: text between added tokens → ids (bpe_bytes.cpp).
  void encode_bytes(std::string_view text, std::vector<int32_t>& out) const;
  // SentencePiece: the same (bpe_sentencepiece.cpp). first: nothing stood before this text.
  void encode_marked(std::string_view text, bool first, std::vector<int32_t>& out) const;
};

// The GPT-2 byte alphabet: a printable character for every byte (bpe_bytes.cpp).
const std::array<std::string, 256>& byte_alphabet();
// The bytes that a piece of that alphabet stands for; characters outside it stand for themselves.
std::string bytes_of_alphabet(std::string_view piece);
void append_bytes_of_alphabet(std::string_view piece, std::string& out);  // the same, behind `out`
// "<0x0A>" → 10; nothing for any other piece.
std::optional<uint8_t> byte_of_piece(std::string_view piece);
inline constexpr std::string_view kWordMark = "\xE2\x96\x81";  // U+2581

// Merges of a SentencePiece vocabulary, derived from its scores (spec §9); fills merges and ranks.
void derive_merges(TokenizerData& data);
// What every SentencePiece source needs after its pieces, types, scores and word_mark are set:
// index, byte fallback, literal tokens, merges (tokenizer_spec.cpp).
void complete_sentencepiece(TokenizerData& data);

// ---- readers (each throws Error)
std::shared_ptr<TokenizerData> read_tokenizer_json(std::string text, std::string_view name);
std::shared_ptr<TokenizerData> read_sentencepiece(std::string_view bytes, std::string_view name);
std::shared_ptr<TokenizerData> read_spec(TokenizerSpec spec);
// tokenizer.json or tokenizer.model with the files beside it (tokenizer_config.cpp).
std::shared_ptr<TokenizerData> read_tokenizer_folder(const std::filesystem::path& folder);
// Special tokens, add_bos and template of a tokenizer_config.json over what data has.
void apply_tokenizer_config(TokenizerData& data, std::string text);
// bos_token_id and eos_token_id of a generation_config.json or config.json; `fill_only` keeps what
// is set.
void apply_token_ids(TokenizerData& data, std::string_view text, std::string_view name,
                     bool fill_only);
// Template in a file of its own: also put into the configuration text that is written out.
void set_chat_template(TokenizerData& data, std::string text);
std::string write_tokenizer_json(const TokenizerData& data);
std::string write_tokenizer_config(const TokenizerData& data);
std::string write_generation_config(const TokenizerData& data);

}  // namespace omq
