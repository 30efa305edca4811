// Reads a Hugging Face tokenizer.json (BPE): vocabulary, merges, added tokens, normaliser,
// pre-tokenizer.
//
// Every part that we do not reproduce exactly is an error that names it; a silent difference in
// token ids would only show as a slightly worse perplexity. Reference: spec/interop-formats.md §9.

#include <nlohmann/json.hpp>

#include "models/tokenizer_data.h"
#include "tensor/error.h"

namespace omq {

namespace {

using nlohmann::json;

// obj[key] as T, or the fallback when the key is missing or null.
template <class T> T value_or(const json& object, const char* key, T fallback) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? fallback : it->get<T>();
}

const json& child(const json& object, const char* key) {
  static const json null;
  const auto it = object.find(key);
  return it == object.end() ? null : *it;
}

// A pipeline member as a flat list: nothing, the member itself, or the members of a Sequence.
void flatten(const json& part, const char* list, std::vector<const json*>& out, int depth = 0) {
  check(depth < 8, "{} nested more than 8 deep", list);
  if (part.is_null()) return;
  if (part.at("type") != "Sequence") {
    out.push_back(&part);
    return;
  }
  for (const json& member : part.at(list)) flatten(member, list, out, depth + 1);
}

std::string unmark(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const bool mark = text.substr(i, kWordMark.size()) == kWordMark;
    out += mark ? ' ' : text[i];
    i += mark ? kWordMark.size() : 1;
  }
  return out;
}

void read_vocab(TokenizerData& d, const json& root) {
  const json& model = root.at("model");
  const std::string type = value_or<std::string>(model, "type", "BPE");
  check(type == "BPE", "model type {:?} is not supported, only BPE is", type);
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    check(value_or<std::string>(model, key, "").empty(), "BPE with {} is not supported", key);
  const json& vocab = model.at("vocab");
  check(vocab.is_object(), "model.vocab is not an object of token: id");
  const json& added = child(root, "added_tokens");
  d.id_limit = static_cast<int64_t>(vocab.size() + added.size()) + 1'000'000;
  for (const auto& [piece, id] : vocab.items()) {
    check(id.is_number_integer(), "the id of token {:?} is not an integer", piece);
    if (!piece.empty()) d.set_piece(id.get<int64_t>(), piece, TokenType::Normal);
  }
  d.byte_fallback = value_or(model, "byte_fallback", false);
  d.fuse_unk = value_or(model, "fuse_unk", false);
  d.ignore_merges = value_or(model, "ignore_merges", false);
  if (d.byte_fallback)
    for (size_t id = 0; id < d.pieces.size(); ++id)
      if (byte_of_piece(d.pieces[id])) d.types[id] = TokenType::Byte;
}

void read_added(TokenizerData& d, const json& root) {
  for (const json& entry : child(root, "added_tokens")) {
    AddedToken token;
    token.content = entry.at("content").get<std::string>();
    const int64_t id = entry.at("id").get<int64_t>();
    token.special = value_or(entry, "special", false);
    token.lstrip = value_or(entry, "lstrip", false);
    token.rstrip = value_or(entry, "rstrip", false);
    token.single_word = value_or(entry, "single_word", false);
    if (token.content.empty()) continue;
    d.set_piece(id, token.content, token.special ? TokenType::Control : TokenType::UserDefined);
    token.id = static_cast<int32_t>(id);
    // A normalised token is matched after spaces became word marks; we match before.
    if (!d.byte_level && value_or(entry, "normalized", false))
      token.content = unmark(token.content);
    d.added.push_back(std::move(token));
  }
}

void read_merges(TokenizerData& d, const json& root) {
  const json& merges = root.at("model").at("merges");
  check(merges.is_array(), "model.merges is not a list");
  d.merges.reserve(merges.size());
  std::string joined;
  for (size_t i = 0; i < merges.size(); ++i) {
    std::string left, right;
    if (merges[i].is_string()) {
      const auto& text = merges[i].get_ref<const std::string&>();
      if (i == 0 && text.starts_with("#version")) continue;
      const size_t space = text.find(' ');
      check(space != text.npos && space > 0 && space + 1 < text.size() &&
                text.find(' ', space + 1) == text.npos,
            "merge {} is {:?}, not two tokens and a space between", i, text);
      left = text.substr(0, space), right = text.substr(space + 1);
    } else {
      check(merges[i].is_array() && merges[i].size() == 2, "merge {} is not a pair of tokens", i);
      left = merges[i][0].get<std::string>(), right = merges[i][1].get<std::string>();
    }
    Merge merge{};
    const std::string result = left + right;
    for (const auto& [name, slot] : {std::pair<const std::string*, int32_t*>{&left, &merge.left},
                                     {&right, &merge.right},
                                     {&result, &merge.result}}) {
      const auto id = d.id_of(*name);
      check(id.has_value(), "merge {} ({:?} + {:?}): token {:?} is not in the vocabulary", i, left,
            right, *name);
      *slot = *id;
    }
    d.merges.push_back(merge);
  }
}

void read_normalizer(TokenizerData& d, const json& root) {
  std::vector<const json*> parts;
  flatten(child(root, "normalizer"), "normalizers", parts);
  for (const json* part : parts) {
    const auto type = part->at("type").get<std::string>();
    if (type == "NFC") {
      d.normalize_nfc = true;
    } else if (type == "Prepend" && part->at("prepend") == kWordMark) {
      d.word_mark = WordMark::Always;
    } else if (type == "Replace") {
      check(child(part->at("pattern"), "String") == " " && part->at("content") == kWordMark,
            "normalizer {} is not supported, only that of a space by U+2581 is", part->dump());
    } else {
      fail("normalizer {:?} is not supported", type);
    }
  }
}

SplitStep read_split(const json& part) {
  SplitStep step;
  const auto behavior = part.at("behavior").get<std::string>();
  const bool invert = value_or(part, "invert", false);
  const bool drop_gaps = behavior == "Removed" && invert;
  check(behavior == "Isolated" || drop_gaps,
        "pre-tokenizer Split with behavior {:?} is not supported", behavior);
  const json& regex = child(part.at("pattern"), "Regex");
  check(regex.is_string(), "pre-tokenizer Split needs a Regex pattern, not {}",
        part.at("pattern").dump());
  step.pattern = compile_pattern(regex.get<std::string>());
  step.keep_gaps = !drop_gaps;
  return step;
}

void read_pretokenizer(TokenizerData& d, const json& root) {
  std::vector<const json*> parts;
  flatten(child(root, "pre_tokenizer"), "pretokenizers", parts);
  for (const json* part : parts) {
    const auto type = part->at("type").get<std::string>();
    if (type == "Split" && d.byte_level) {
      d.steps.push_back(read_split(*part));
    } else if (type == "Digits") {
      const bool single = value_or(*part, "individual_digits", false);
      d.steps.push_back({compile_pattern(single ? kDigitPattern : kDigitRunPattern), true, false});
    } else if (type == "ByteLevel") {
      SplitStep step;
      step.prefix_space = value_or(*part, "add_prefix_space", true);
      if (value_or(*part, "use_regex", true)) step.pattern = compile_pattern(kGpt2Pattern);
      d.steps.push_back(std::move(step));
    } else if (type == "Metaspace") {
      check(part->at("replacement") == kWordMark, "Metaspace with another mark than U+2581");
      const bool prefix = value_or(*part, "add_prefix_space", true);
      const auto scheme =
          value_or<std::string>(*part, "prepend_scheme", prefix ? "always" : "never");
      check(scheme == "always" || scheme == "never" || scheme == "first",
            "Metaspace with prepend_scheme {:?} is not supported", scheme);
      d.word_mark = scheme == "always"  ? WordMark::UnlessPresent
                    : scheme == "first" ? WordMark::FirstUnlessPresent
                                        : WordMark::None;
      d.split_words = value_or(*part, "split", true);
    } else {
      fail("pre-tokenizer {:?} is not supported", type);
    }
  }
  check(d.byte_level || d.steps.empty(), "digit splitting without a ByteLevel pre-tokenizer");
}

bool has_part(const json& part, const char* list, std::initializer_list<const char*> types) {
  std::vector<const json*> parts;
  flatten(part, list, parts);
  for (const json* p : parts)
    for (const char* type : types)
      if (p->at("type") == type) return true;
  return false;
}

// The token that a TemplateProcessing puts before the text.
void read_postprocessor(TokenizerData& d, const json& root) {
  std::vector<const json*> parts;
  flatten(child(root, "post_processor"), "processors", parts);
  for (const json* part : parts) {
    if (part->at("type") != "TemplateProcessing") continue;
    const json& single = part->at("single");
    if (!single.is_array() || single.empty()) continue;
    const json& token = child(single[0], "SpecialToken");
    if (!token.is_object()) continue;
    d.bos = d.id_of(token.at("id").get<std::string>());
    d.add_bos = d.bos.has_value();
  }
}

void read_all(TokenizerData& d, const json& root) {
  check(root.is_object() && root.contains("model"), "there is no model in it");
  const json &pre = child(root, "pre_tokenizer"), &decoder = child(root, "decoder");
  d.byte_level = has_part(pre, "pretokenizers", {"ByteLevel"});
  const bool marked =
      !d.byte_level && (has_part(decoder, "decoders", {"ByteFallback", "Metaspace"}) ||
                        has_part(pre, "pretokenizers", {"Metaspace"}) ||
                        has_part(child(root, "normalizer"), "normalizers", {"Prepend", "Replace"}));
  check(d.byte_level || marked,
        "neither byte-level (pre-tokenizer ByteLevel) nor SentencePiece-like (U+2581) BPE");
  read_vocab(d, root);
  read_added(d, root);
  d.index_pieces();
  read_merges(d, root);
  read_normalizer(d, root);
  read_pretokenizer(d, root);
  d.strip_first_space = marked && has_part(decoder, "decoders", {"Strip", "Metaspace"});
  if (const json& unk = child(root.at("model"), "unk_token"); unk.is_string()) {
    d.unk = d.id_of(unk.get<std::string>());
    if (d.unk) d.types[*d.unk] = TokenType::Unknown;
  }
  read_postprocessor(d, root);
}

}  // namespace

std::shared_ptr<TokenizerData> read_tokenizer_json(std::string text, std::string_view name) {
  auto data = std::make_shared<TokenizerData>();
  data->name = name;
  with_context(fmt::format("reading {}", name), [&] {
    try {
      read_all(*data, json::parse(text));
    } catch (const json::exception& e) {
      fail("not a valid tokenizer.json: {}", e.what());
    }
  });
  data->tokenizer_json = std::move(text);
  return data;
}

}  // namespace omq
