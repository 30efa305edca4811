// Reads a SentencePiece tokenizer.model: a protobuf ModelProto with pieces, scores and a few
// settings.
//
// The reader knows the four protobuf wire types and nothing else; every length is checked against
// the bytes that are left. Reference: spec/interop-formats.md §9 (field numbers); protobuf encoding
// specification.

#include <bit>
#include <cstring>

#include "models/tokenizer_data.h"
#include "tensor/error.h"

namespace omq {

namespace {

struct Field {
  uint64_t number = 0;
  uint64_t value = 0;        // varint, or the bits of a fixed32/fixed64
  std::string_view payload;  // length-delimited
};

class ProtobufReader {
 public:
  explicit ProtobufReader(std::string_view bytes) : left_(bytes) {}

  bool next(Field& field) {
    if (left_.empty()) return false;
    const uint64_t tag = varint();
    field = {tag >> 3, 0, {}};
    switch (tag & 7) {
      case 0:
        field.value = varint();
        break;
      case 1:
        field.value = fixed<uint64_t>();
        break;
      case 2:
        field.payload = take(varint());
        break;
      case 5:
        field.value = fixed<uint32_t>();
        break;
      default:
        fail("protobuf field {} has the unknown wire type {}", tag >> 3, tag & 7);
    }
    check(field.number > 0, "protobuf field number 0");
    return true;
  }

 private:
  std::string_view take(uint64_t n) {
    check(n <= left_.size(), "truncated: a field of {} bytes with {} left", n, left_.size());
    const std::string_view bytes = left_.substr(0, n);
    left_.remove_prefix(n);
    return bytes;
  }
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    fail("protobuf varint of more than 10 bytes");
  }
  template <class T> T fixed() {
    T value = 0;  // little-endian, as every machine we build for
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view left_;
};

void read_piece(TokenizerData& d, std::string_view bytes) {
  std::string piece;
  float score = 0;
  uint64_t type = static_cast<uint64_t>(TokenType::Normal);
  Field f;
  for (ProtobufReader reader(bytes); reader.next(f);) {
    if (f.number == 1) piece = f.payload;
    if (f.number == 2) score = std::bit_cast<float>(static_cast<uint32_t>(f.value));
    if (f.number == 3) type = f.value;
  }
  const auto id = static_cast<int64_t>(d.pieces.size());
  check(!piece.empty(), "piece {} is empty", id);
  check(type >= 1 && type <= 6, "piece {} ({:?}) has the unknown type {}", id, piece, type);
  check(score == score, "piece {} ({:?}) has NaN as its score", id, piece);
  d.set_piece(id, std::move(piece), static_cast<TokenType>(type));
  d.scores.push_back(score);
}

struct Ids {
  int64_t model_type = 1, unk = 0, bos = 1, eos = 2, pad = -1;  // SentencePiece's own defaults
};

void read_trainer(Ids& ids, std::string_view bytes) {
  Field f;
  for (ProtobufReader reader(bytes); reader.next(f);) {
    const auto value = static_cast<int64_t>(static_cast<int32_t>(f.value));
    if (f.number == 3) ids.model_type = value;
    if (f.number == 40) ids.unk = value;
    if (f.number == 41) ids.bos = value;
    if (f.number == 42) ids.eos = value;
    if (f.number == 43) ids.pad = value;
  }
}

void read_normalizer(TokenizerData& d, std::string_view bytes) {
  bool dummy_prefix = true, collapse = true, escape = true;
  bool has_map = false;
  std::string name;
  Field f;
  for (ProtobufReader reader(bytes); reader.next(f);) {
    if (f.number == 1) name = f.payload;
    if (f.number == 2) has_map = !f.payload.empty();
    if (f.number == 3) dummy_prefix = f.value != 0;
    if (f.number == 4) collapse = f.value != 0;
    if (f.number == 5) escape = f.value != 0;
  }
  check(!has_map,
        "its normaliser {:?} rewrites characters, which is not supported; use tokenizer.json",
        name);
  check(!collapse,
        "its normaliser removes extra spaces, which is not supported; use tokenizer.json");
  check(escape, "its normaliser leaves spaces as they are, which is not supported");
  d.word_mark = dummy_prefix ? WordMark::Always : WordMark::None;
}

void read_model(TokenizerData& d, std::string_view bytes) {
  check(!bytes.empty(), "the file is empty");
  const size_t line = bytes.find('\n');
  const bool ranks =
      line != bytes.npos && line < 64 && bytes.substr(0, line).find("= ") != bytes.npos;
  check(!ranks, "a list of tiktoken ranks, not a SentencePiece model; tokenizer.json is needed");
  d.id_limit = static_cast<int64_t>(bytes.size());
  Ids ids;
  Field f;
  d.word_mark = WordMark::Always;
  for (ProtobufReader reader(bytes); reader.next(f);) {
    if (f.number == 1) read_piece(d, f.payload);
    if (f.number == 2) read_trainer(ids, f.payload);
    if (f.number == 3) read_normalizer(d, f.payload);
  }
  check(!d.pieces.empty(), "there are no pieces in it");
  check(ids.model_type == 2, "SentencePiece model type {} is not supported, only BPE (2) is",
        ids.model_type);
  const auto valid = [&](int64_t id) -> std::optional<int32_t> {
    if (id < 0 || id >= static_cast<int64_t>(d.pieces.size())) return {};
    return static_cast<int32_t>(id);
  };
  d.unk = valid(ids.unk), d.bos = valid(ids.bos), d.pad = valid(ids.pad);
  if (const auto eos = valid(ids.eos)) d.eos = {*eos};
  d.id_limit += 1'000'000;  // tokens that tokenizer_config.json adds
}

}  // namespace

std::shared_ptr<TokenizerData> read_sentencepiece(std::string_view bytes, std::string_view name) {
  auto data = std::make_shared<TokenizerData>();
  data->name = name;
  with_context(fmt::format("reading {}", name), [&] {
    read_model(*data, bytes);
    complete_sentencepiece(*data);
  });
  data->add_bos = true;  // the models that ship such a file were all trained with it
  return data;
}

}  // namespace omq
