// Tokenizers from plain data: the tokenizer.ggml.* keys of GGUF, and what SentencePiece
// vocabularies share.
//
// Reference: spec/interop-formats.md §5 (keys), §9. The pre-tokenizer names are those of GGUF
// files.

#include <algorithm>
#include <cmath>

#include "models/tokenizer_data.h"
#include "tensor/error.h"

namespace omq {

namespace {

struct PreTokenizer {
  std::string_view gguf_name;
  std::string_view family;  // what the writer knows: gpt2, llama3, smollm, qwen2
};

constexpr PreTokenizer kPreTokenizers[] = {
    {"default", "gpt2"},     {"gpt-2", "gpt2"},       {"gpt2", "gpt2"},
    {"phi-2", "gpt2"},       {"olmo", "gpt2"},        {"mpt", "gpt2"},
    {"llama-bpe", "llama3"}, {"llama3", "llama3"},    {"llama-v3", "llama3"},
    {"smollm", "smollm"},    {"starcoder", "smollm"}, {"refact", "smollm"},
    {"command-r", "smollm"}, {"qwen2", "qwen2"},      {"deepseek-r1-qwen", "qwen2"},
};

void read_pre(TokenizerData& d, std::string_view pre) {
  const auto* found = std::find_if(std::begin(kPreTokenizers), std::end(kPreTokenizers),
                                   [&](const PreTokenizer& p) { return p.gguf_name == pre; });
  if (found == std::end(kPreTokenizers)) {
    std::string known;
    for (const PreTokenizer& p : kPreTokenizers) known += fmt::format(" {}", p.gguf_name);
    fail("tokenizer.ggml.pre is {:?}, a pre-tokenizer not supported here; known are{}", pre, known);
  }
  d.pre = found->family;
  const auto step = [&](std::string_view expression) {
    d.steps.push_back({compile_pattern(expression), true, false});
  };
  if (d.pre == "smollm") step(kDigitPattern);
  if (d.pre == "gpt2" || d.pre == "smollm") step(kGpt2Pattern);
  if (d.pre == "llama3") step(kLlama3Pattern);
  if (d.pre == "qwen2") step(kQwen2Pattern);
  d.ignore_merges = d.pre == "llama3";
  d.normalize_nfc = d.pre == "qwen2";
}

void read_merge_strings(TokenizerData& d, const std::vector<std::string>& merges) {
  check(!merges.empty(), "byte-level BPE needs tokenizer.ggml.merges");
  for (size_t i = 0; i < merges.size(); ++i) {
    const std::string_view text = merges[i];
    const size_t space = text.find(' ');
    check(space != text.npos && space > 0 && space + 1 < text.size(),
          "merge {} is {:?}, not two tokens and a space between", i, text);
    const std::string_view left = text.substr(0, space), right = text.substr(space + 1);
    const std::string result = std::string(left) + std::string(right);
    for (const std::string_view part : {left, right, std::string_view(result)})
      check(d.id_of(part).has_value(),
            "merge {} ({:?} + {:?}): token {:?} is not in the vocabulary", i, left, right, part);
    d.merges.push_back({*d.id_of(left), *d.id_of(right), *d.id_of(result)});
  }
}

TokenType guess_type(std::string_view piece, bool byte_level) {
  if (byte_level) {
    const bool control = piece.size() > 4 && piece.starts_with("<|") && piece.ends_with("|>");
    return control ? TokenType::Control : TokenType::Normal;
  }
  if (piece == "<unk>") return TokenType::Unknown;
  if (piece == "<s>" || piece == "</s>") return TokenType::Control;
  return byte_of_piece(piece) ? TokenType::Byte : TokenType::Normal;
}

void read_tokens(TokenizerData& d, TokenizerSpec& spec) {
  const size_t n = spec.tokens.size();
  check(n > 0, "tokenizer.ggml.tokens is missing or empty");
  check(n < (1u << 30), "{} tokens are too many", n);
  check(spec.types.empty() || spec.types.size() == n, "{} token types for {} tokens",
        spec.types.size(), n);
  check(spec.scores.empty() || spec.scores.size() == n, "{} scores for {} tokens",
        spec.scores.size(), n);
  d.id_limit = static_cast<int64_t>(n);
  for (size_t i = 0; i < n; ++i) {
    TokenType type = guess_type(spec.tokens[i], d.byte_level);
    if (!spec.types.empty()) {
      // 0 (undefined) is written by some converters for ordinary tokens
      check(spec.types[i] >= 0 && spec.types[i] <= 6, "token {} ({:?}) has the unknown type {}", i,
            spec.tokens[i], spec.types[i]);
      type = spec.types[i] == 0 ? TokenType::Normal : static_cast<TokenType>(spec.types[i]);
    }
    d.set_piece(static_cast<int64_t>(i), std::move(spec.tokens[i]), type);
  }
  d.scores = std::move(spec.scores);
}

void read_ids(TokenizerData& d, const TokenizerSpec& spec) {
  const auto take = [&](const char* key, std::optional<int32_t> id) -> std::optional<int32_t> {
    // −1 and the like stand for "none" in some files
    if (!id || *id < 0) return {};
    check(*id < static_cast<int64_t>(d.pieces.size()),
          "tokenizer.ggml.{}_token_id is {}, outside the vocabulary of {}", key, *id,
          d.pieces.size());
    return id;
  };
  d.bos = take("bos", spec.bos_id);
  d.unk = take("unknown", spec.unk_id);
  d.pad = take("padding", spec.pad_id);
  for (const auto id : {take("eos", spec.eos_id), take("eot", spec.eot_id)})
    if (id && std::find(d.eos.begin(), d.eos.end(), *id) == d.eos.end()) d.eos.push_back(*id);
}

void add_literal_tokens(TokenizerData& d) {
  for (size_t id = 0; id < d.pieces.size(); ++id) {
    const TokenType type = d.types[id];
    const bool literal = type == TokenType::UserDefined;
    if (!literal && type != TokenType::Control && type != TokenType::Unknown) continue;
    AddedToken token;
    token.id = static_cast<int32_t>(id);
    token.special = !literal;
    token.content = d.pieces[id];
    if (literal && !d.byte_level)
      for (size_t at; (at = token.content.find(kWordMark)) != std::string::npos;)
        token.content.replace(at, kWordMark.size(), " ");
    d.added.push_back(std::move(token));
  }
}

void read_into(TokenizerData& d, TokenizerSpec& spec) {
  check(spec.model == "gpt2" || spec.model == "llama",
        "tokenizer.ggml.model is {:?}; supported are \"llama\" (SentencePiece BPE) and \"gpt2\" "
        "(byte-level BPE)",
        spec.model);
  d.byte_level = spec.model == "gpt2";
  read_tokens(d, spec);
  read_ids(d, spec);
  d.chat_template = std::move(spec.chat_template);
  if (d.byte_level) {
    d.index_pieces();
    read_pre(d, spec.pre);
    read_merge_strings(d, spec.merges);
    d.add_bos = spec.add_bos.value_or(d.pre == "llama3");
    add_literal_tokens(d);
    return;
  }
  check(d.scores.size() == d.pieces.size(),
        "a SentencePiece vocabulary needs tokenizer.ggml.scores");
  for (size_t id = 0; id < d.scores.size(); ++id)
    check(!std::isnan(d.scores[id]), "token {} ({:?}) has NaN as its score", id, d.pieces[id]);
  if (!spec.bos_id) d.bos = d.pieces.size() > 1 ? std::optional(1) : std::nullopt;
  if (!spec.eos_id && d.eos.empty() && d.pieces.size() > 2) d.eos = {2};
  d.word_mark = spec.add_space_prefix.value_or(true) ? WordMark::Always : WordMark::None;
  d.add_bos = spec.add_bos.value_or(true);
  complete_sentencepiece(d);
}

}  // namespace

void complete_sentencepiece(TokenizerData& d) {
  d.byte_level = false;
  d.index_pieces();
  d.fuse_unk = true;
  d.strip_first_space = d.word_mark != WordMark::None;
  for (size_t id = 0; id < d.pieces.size(); ++id) {
    if (d.types[id] == TokenType::Byte)
      check(byte_of_piece(d.pieces[id]).has_value(),
            "byte token {} is {:?}, not of the form <0x0A>", id, d.pieces[id]);
    d.byte_fallback = d.byte_fallback || d.types[id] == TokenType::Byte;
    if (!d.unk && d.types[id] == TokenType::Unknown) d.unk = static_cast<int32_t>(id);
  }
  add_literal_tokens(d);
  derive_merges(d);
}

std::shared_ptr<TokenizerData> read_spec(TokenizerSpec spec) {
  auto data = std::make_shared<TokenizerData>();
  data->name = "the GGUF tokenizer";
  with_context("reading the GGUF tokenizer keys", [&] { read_into(*data, spec); });
  return data;
}

}  // namespace omq
