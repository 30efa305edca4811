// Tokenizer: added tokens first, then BPE on the text between them; decoding; see tokenizer.h.

#include "models/tokenizer.h"

#include <algorithm>
#include <cctype>

#include "models/tokenizer_data.h"
#include "tensor/error.h"

namespace omq {

void TokenizerData::set_piece(int64_t id, std::string piece, TokenType type) {
  check(id >= 0 && id < id_limit, "{}: token {:?} has id {}, which is outside [0, {})", name, piece,
        id, id_limit);
  if (static_cast<size_t>(id) >= pieces.size()) {
    pieces.resize(id + 1);
    types.resize(id + 1, TokenType::Unused);
  }
  check(pieces[id].empty() || pieces[id] == piece, "{}: tokens {:?} and {:?} have the same id {}",
        name, pieces[id], piece, id);
  pieces[id] = std::move(piece);
  types[id] = type;
}

void TokenizerData::index_pieces() {
  ids.clear();
  ids.reserve(pieces.size());
  for (size_t id = 0; id < pieces.size(); ++id)
    if (!pieces[id].empty()) ids.emplace(pieces[id], static_cast<int32_t>(id));
}

std::optional<int32_t> TokenizerData::id_of(std::string_view piece) const {
  const auto found = ids.find(piece);
  if (found == ids.end()) return {};
  return found->second;
}

void TokenizerData::finish() {
  check(!pieces.empty(), "{}: the vocabulary is empty", name);
  merge_table.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i)
    merge_table.add(merges[i].left, merges[i].right,
                    ranks.empty() ? static_cast<uint32_t>(i) : ranks[i], merges[i].result);
  for (int b = 0; b < 256; ++b)
    byte_ids[b] =
        id_of(byte_level ? byte_alphabet()[b] : fmt::format("<0x{:02X}>", b)).value_or(-1);
  for (size_t i = 0; i < added.size(); ++i)
    if (!added[i].content.empty())
      added_by_first[static_cast<unsigned char>(added[i].content[0])].push_back(
          static_cast<uint32_t>(i));
  for (auto& list : added_by_first)
    std::stable_sort(list.begin(), list.end(), [&](uint32_t a, uint32_t b) {
      return added[a].content.size() > added[b].content.size();
    });
  if (ignore_merges)
    for (size_t id = 0; id < pieces.size(); ++id)
      if (types[id] == TokenType::Normal && !pieces[id].empty())
        whole_pieces.emplace(byte_level ? bytes_of_alphabet(pieces[id]) : pieces[id],
                             static_cast<int32_t>(id));
  words_independent = std::none_of(pieces.begin(), pieces.end(), [](std::string_view piece) {
    while (piece.starts_with(kWordMark)) piece.remove_prefix(kWordMark.size());
    return piece.find(kWordMark) != piece.npos;
  });
  const auto outside = [&](int32_t id) {
    return id < 0 || static_cast<size_t>(id) >= pieces.size();
  };
  std::erase_if(eos, outside);  // a model may declare ids that its tokenizer cannot produce
  for (auto* id : {&bos, &unk, &pad})
    if (*id && outside(**id)) id->reset();
  add_bos = add_bos && bos.has_value();
}

Tokenizer::Tokenizer(std::shared_ptr<const TokenizerData> data) : data_(std::move(data)) {}

Tokenizer Tokenizer::from_spec(TokenizerSpec spec) {
  auto data = read_spec(std::move(spec));
  data->finish();
  return Tokenizer(std::move(data));
}

Tokenizer Tokenizer::from_json(std::string tokenizer_json, std::string tokenizer_config_json,
                               std::string_view generation_config_json, std::string_view name) {
  auto data = read_tokenizer_json(std::move(tokenizer_json), name);
  if (!tokenizer_config_json.empty())
    apply_tokenizer_config(*data, std::move(tokenizer_config_json));
  if (!generation_config_json.empty())
    apply_token_ids(*data, generation_config_json, "generation_config.json", false);
  data->finish();
  return Tokenizer(std::move(data));
}

Tokenizer Tokenizer::from_sentencepiece(std::string_view bytes, std::string tokenizer_config_json,
                                        std::string_view name) {
  auto data = read_sentencepiece(bytes, name);
  if (!tokenizer_config_json.empty())
    apply_tokenizer_config(*data, std::move(tokenizer_config_json));
  data->finish();
  return Tokenizer(std::move(data));
}

Tokenizer Tokenizer::from_folder(const std::filesystem::path& folder) {
  auto data = read_tokenizer_folder(folder);
  data->finish();
  return Tokenizer(std::move(data));
}

namespace {

bool word_byte(char c) {
  const auto b = static_cast<unsigned char>(c);
  return b >= 0x80 || std::isalnum(b) || b == '_';
}

bool matches_at(const AddedToken& token, std::string_view text, size_t i) {
  if (text.substr(i, token.content.size()) != token.content) return false;
  if (!token.single_word) return true;
  const size_t end = i + token.content.size();
  return !(i > 0 && word_byte(text[i - 1])) && !(end < text.size() && word_byte(text[end]));
}

size_t skip_spaces(std::string_view text, size_t i) {
  while (i < text.size()) {
    size_t after = i;
    if (char_class(utf8_next(text, after)) != CharClass::Space) break;
    i = after;
  }
  return i;
}

// Start of the white space that ends at `end`, not before `begin`.
size_t skip_spaces_back(std::string_view text, size_t begin, size_t end) {
  while (end > begin) {
    size_t start = end - 1;
    while (start > begin && (text[start] & 0xC0) == 0x80) --start;
    size_t after = start;
    if (char_class(utf8_next(text, after)) != CharClass::Space) break;
    end = start;
  }
  return end;
}

}  // namespace

std::vector<int32_t> Tokenizer::encode(std::string_view raw, EncodeOptions options) const {
  const TokenizerData& d = *data_;
  std::string storage;
  const std::string_view text = utf8_valid(raw, storage);
  std::vector<int32_t> out;
  if (options.add_bos.value_or(d.add_bos)) {
    check(d.bos.has_value(), "{}: the tokenizer has no beginning-of-text token to add", d.name);
    out.push_back(*d.bos);
  }
  const auto section = [&](size_t begin, size_t end) {
    if (begin >= end) return;
    const std::string_view part = text.substr(begin, end - begin);
    if (d.byte_level)
      d.encode_bytes(part, out);
    else
      d.encode_marked(part, begin == 0, out);
  };
  size_t begin = 0;
  for (size_t i = 0; i < text.size();) {
    const AddedToken* hit = nullptr;
    for (const uint32_t k : d.added_by_first[static_cast<unsigned char>(text[i])]) {
      const AddedToken& token = d.added[k];
      if ((token.special && !options.parse_special) || !matches_at(token, text, i)) continue;
      hit = &token;
      break;
    }
    if (hit == nullptr) {
      ++i;
      continue;
    }
    section(begin, hit->lstrip ? skip_spaces_back(text, begin, i) : i);
    out.push_back(hit->id);
    i += hit->content.size();
    if (hit->rstrip) i = skip_spaces(text, i);
    begin = i;
  }
  section(begin, text.size());
  return out;
}

const std::string& Tokenizer::token_piece(int32_t id) const {
  check(id >= 0 && id < vocab_size(), "{}: token id {} is outside the vocabulary of {}",
        data_->name, id, vocab_size());
  return data_->pieces[id];
}

void Tokenizer::append_bytes(int32_t id, std::string& out) const {
  const std::string_view piece = token_piece(id);
  const TokenType type = data_->types[id];
  if (type == TokenType::Control || type == TokenType::Unknown) {
    out += piece;
    return;
  }
  if (data_->byte_level) {
    if (type == TokenType::Normal)
      append_bytes_of_alphabet(piece, out);
    else
      out += piece;
    return;
  }
  if (type == TokenType::Byte)
    if (const auto byte = byte_of_piece(piece)) {
      out += static_cast<char>(*byte);
      return;
    }
  for (size_t i = 0; i < piece.size();) {
    const bool mark = piece.substr(i, kWordMark.size()) == kWordMark;
    out += mark ? ' ' : piece[i];
    i += mark ? kWordMark.size() : 1;
  }
}

std::string Tokenizer::token_bytes(int32_t id) const {
  std::string out;
  append_bytes(id, out);
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, DecodeOptions options) const {
  StreamDecoder decoder(*this, options);
  std::string out;
  for (const int32_t id : ids) out += decoder.push(id);
  return out + decoder.flush();
}

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(data_->pieces.size()); }
std::optional<int32_t> Tokenizer::token_id(std::string_view piece) const {
  return data_->id_of(piece);
}
bool Tokenizer::is_special(int32_t id) const {
  token_piece(id);
  return data_->types[id] == TokenType::Control || data_->types[id] == TokenType::Unknown;
}
std::optional<int32_t> Tokenizer::bos_id() const { return data_->bos; }
std::optional<int32_t> Tokenizer::unk_id() const { return data_->unk; }
const std::vector<int32_t>& Tokenizer::eos_ids() const { return data_->eos; }
bool Tokenizer::adds_bos() const { return data_->add_bos; }
bool Tokenizer::strips_first_space() const { return data_->strip_first_space; }
const std::string& Tokenizer::chat_template() const { return data_->chat_template; }

bool Tokenizer::ends_text(int32_t id) const {
  if (std::find(data_->eos.begin(), data_->eos.end(), id) != data_->eos.end()) return true;
  if (id < 0 || id >= vocab_size() || data_->types[id] != TokenType::Control) return false;
  for (const std::string_view name : {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>",
                                      "<|endoftext|>", "<|end|>", "<end_of_turn>", "</s>"})
    if (data_->pieces[id] == name) return true;
  return false;
}

std::string Tokenizer::to_tokenizer_json() const {
  return data_->tokenizer_json.empty() ? write_tokenizer_json(*data_) : data_->tokenizer_json;
}
std::string Tokenizer::to_tokenizer_config_json() const {
  return data_->tokenizer_config_json.empty() ? write_tokenizer_config(*data_)
                                              : data_->tokenizer_config_json;
}
std::string Tokenizer::to_generation_config_json() const { return write_generation_config(*data_); }

StreamDecoder::StreamDecoder(Tokenizer tokenizer, DecodeOptions options)
    : tokenizer_(std::move(tokenizer)), options_(options), at_start_(options.start_of_text) {
  constexpr size_t kUsual = 256;  // bytes of a token's text: rarely more
  pending_.reserve(kUsual);
  text_.reserve(kUsual);
}

const std::string& StreamDecoder::push(int32_t id) {
  text_.clear();
  if (options_.skip_special && tokenizer_.is_special(id)) return text_;
  const size_t begin = pending_.size();
  tokenizer_.append_bytes(id, pending_);
  if (at_start_ && pending_.size() > begin) {
    if (tokenizer_.strips_first_space() && pending_[begin] == ' ') pending_.erase(begin, 1);
    at_start_ = false;
  }
  utf8_take(pending_, false, text_);
  return text_;
}

const std::string& StreamDecoder::flush() {
  at_start_ = options_.start_of_text;
  text_.clear();
  utf8_take(pending_, true, text_);
  return text_;
}

}  // namespace omq
