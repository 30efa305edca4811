// Tokenizers on small hand-made vocabularies: what the reference models do not use, and files that
// lie.

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "models/pretokenizer.h"
#include "models/tokenizer.h"
#include "models/tokenizer_utf8.h"
#include "tensor/error.h"

namespace omq {
namespace {

using Ids = std::vector<int32_t>;
using nlohmann::json;

// A SentencePiece vocabulary: specials, 256 byte tokens, then the given pieces with falling scores.
TokenizerSpec small_spec(const std::vector<std::string>& pieces) {
  TokenizerSpec spec;
  spec.model = "llama";
  spec.tokens = {"<unk>", "<s>", "</s>"};
  for (int b = 0; b < 256; ++b) spec.tokens.push_back(fmt::format("<0x{:02X}>", b));
  spec.tokens.insert(spec.tokens.end(), pieces.begin(), pieces.end());
  for (size_t i = 0; i < spec.tokens.size(); ++i)
    spec.scores.push_back(i < 259 ? 0.0f : 258.0f - static_cast<float>(i));
  return spec;
}
const std::vector<std::string> kPieces = {"\u2581", "a",        "b",  "\u2581a",
                                          "ab",     "\u2581ab", "aa", "aaaa"};

// A byte-level tokenizer.json over the letters a, b and the space.
json small_json() {
  return json::parse(R"({
    "version": "1.0", "normalizer": null, "post_processor": null,
    "added_tokens": [{"id": 6, "content": "<e>", "special": true},
                     {"id": 7, "content": "<l>", "special": false, "lstrip": true, "rstrip": true},
                     {"id": 8, "content": "word", "special": false, "single_word": true}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "w": 5},
              "merges": ["a b", ["Ġ", "ab"]]}})");
}

void check_error(const std::string& part, const std::function<void()>& f) {
  CAPTURE(part);
  try {
    f();
    FAIL_CHECK("nothing was thrown");
  } catch (const Error& e) {
    CHECK_MESSAGE(std::string(e.what()).find(part) != std::string::npos, e.what());
  }
}

TEST_CASE("SentencePiece rules on a small vocabulary") {
  const Tokenizer t = Tokenizer::from_spec(small_spec(kPieces));
  const auto encode = [&](std::string_view text) { return t.encode(text, {.add_bos = false}); };
  CHECK(t.encode("a") == Ids{1, 262});
  CHECK(encode("") == Ids{});
  CHECK(encode("ab") == Ids{264});
  CHECK(encode("aab") == Ids{262, 263});  // ▁a scores above ab, ab above aa
  CHECK(encode("xaaaa") == Ids{259, 3 + 'x', 266});
  CHECK(encode("é") == Ids{259, 3 + 0xC3, 3 + 0xA9});
  CHECK(t.decode(encode("é a b")) == "é a b");
  CHECK(t.decode(Ids{1, 262, 261, 2}) == "ab");
  CHECK(t.decode(Ids{1, 262}, {.skip_special = false}) == "<s> a");
  CHECK(encode("</s>a") == Ids{2, 262});
  CHECK(t.encode("</s>", {.add_bos = false, .parse_special = false}).size() == 5);
  CHECK(t.ends_text(2));
  CHECK_FALSE(t.ends_text(262));
  CHECK(t.token_id("aaaa") == 266);
  CHECK_FALSE(t.token_id("zz").has_value());

  TokenizerSpec plain = small_spec(kPieces);
  plain.add_space_prefix = false, plain.add_bos = false;
  CHECK(Tokenizer::from_spec(plain).encode("a a") == Ids{260, 262});

  TokenizerSpec no_bytes = small_spec(kPieces);
  no_bytes.tokens.erase(no_bytes.tokens.begin() + 3, no_bytes.tokens.begin() + 259);
  no_bytes.scores.erase(no_bytes.scores.begin() + 3, no_bytes.scores.begin() + 259);
  CHECK(Tokenizer::from_spec(no_bytes).encode("xyza") == Ids{1, 3, 0, 4});  // one unknown for a run

  TokenizerSpec crossing = small_spec({"\u2581", "a", "b", "a\u2581"});  // merges cross word marks
  CHECK(Tokenizer::from_spec(crossing).encode("a b") == Ids{1, 259, 262, 261});
}

TEST_CASE("long texts without a word end merge in reasonable time") {
  const Tokenizer t = Tokenizer::from_spec(small_spec(kPieces));
  const std::string text(1 << 20, 'a');
  const Ids ids = t.encode(text);
  CHECK(t.decode(ids) == text);
  const Tokenizer bytes = Tokenizer::from_json(small_json().dump());
  CHECK(bytes.encode(text).size() == text.size());
  CHECK(bytes.encode(std::string(1 << 20, ' ')).size() == 1 << 20);
}

TEST_CASE("byte-level rules on a small vocabulary") {
  const Tokenizer t = Tokenizer::from_json(small_json().dump(), R"({"eos_token": {"content": "<e>"},
      "chat_template": [{"name": "x", "template": "X"}, {"name": "default", "template": "D"}]})",
                                           R"({"eos_token_id": [6, 5, 4711]})");
  CHECK(t.encode("ab ab") == Ids{3, 4});
  CHECK(t.encode("azb") == Ids{3});  // no token for z, and no unknown token: it vanishes
  CHECK(t.encode("a<e>b") == Ids{0, 6, 1});
  CHECK(t.encode("a  <l>  b") == Ids{0, 7, 1});
  CHECK(t.encode("word") == Ids{8});
  CHECK(t.encode("awordword word") == Ids{0, 5, 5, 2, 8});
  CHECK(t.eos_ids() == Ids{6, 5});
  CHECK(t.chat_template() == "D");
  CHECK(t.decode(Ids{3, 4, 6}) == "ab ab");
  CHECK(t.decode(Ids{3, 6}, {.skip_special = false}) == "ab<e>");
  check_error("token id 9 is outside the vocabulary of 9", [&] { t.decode(Ids{9}); });
  check_error("token id -1", [&] { t.token_piece(-1); });
  check_error("no beginning-of-text token", [&] { t.encode("a", {.add_bos = true}); });
}

TEST_CASE("streaming holds back unfinished characters and replaces broken ones") {
  const Tokenizer t = Tokenizer::from_spec(small_spec(kPieces));
  const auto byte = [](int b) { return 3 + b; };
  StreamDecoder s(t);
  CHECK(s.push(262) == " a");
  CHECK(s.push(byte(0xF0)) == "");
  CHECK(s.push(byte(0x9F)) == "");
  CHECK(s.push(byte(0xA6)) == "");
  CHECK(s.push(byte(0x99)) == "🦙");
  CHECK(s.push(byte(0xC3)) == "");
  CHECK(s.push(260) == "\uFFFDa");
  CHECK(s.push(byte(0xFF)) == "\uFFFD");
  CHECK(s.push(byte(0xE2)) == "");
  CHECK(s.push(byte(0x96)) == "");
  CHECK(s.flush() == "\uFFFD");
  CHECK(s.flush() == "");
  CHECK(s.push(2) == "");
}

TEST_CASE("text that is not UTF-8 is read with U+FFFD") {
  const Tokenizer t = Tokenizer::from_spec(small_spec(kPieces));
  for (const std::string_view bad :
       {"a\xFF", "a\xC3", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82x", "\xC0\xAF"}) {
    const std::string text = t.decode(t.encode(bad));
    CHECK(text.find("\uFFFD") != std::string::npos);
    CHECK(t.decode(t.encode(text)) == text);
  }
  CHECK(t.decode(t.encode("a\xE2\x82x")) == "a\uFFFDx");  // one for the maximal broken part
  CHECK(t.decode(t.encode("\xED\xA0\x80")) == "\uFFFD\uFFFD\uFFFD");
}

TEST_CASE("composition (NFC)") {
  CHECK(to_nfc("plain") == "plain");
  CHECK(to_nfc("e\u0301") == "é");
  CHECK(to_nfc("\u212B") == "Å");
  CHECK(to_nfc("\u1100\u1161\u11A8") == "각");
  CHECK(to_nfc("q\u0307\u0323") == "q\u0323\u0307");  // marks in order of class
  CHECK(to_nfc("\u0958") == "\u0915\u093C");          // excluded from composition
  CHECK(to_nfc("a\u0315\u0300") == "\u00E0\u0315");   // composes past a mark of higher class
  CHECK(to_nfc("\u0344") == "\u0308\u0301");
}

TEST_CASE("hand-written patterns equal the compiled ones") {
  std::mt19937 random(7);
  const std::u32string alphabet =
      U"ab'sStTrReEvVmMlLdD09½٣٤ "
      U"\u00A0\u3000\u180E\u2028\u0085\t\n\r.,!-éñБ日本각🦙\u0301\u017F";
  for (const std::string_view expression :
       {kGpt2Pattern, kLlama3Pattern, kQwen2Pattern, kDigitPattern, kDigitRunPattern}) {
    const auto known = known_pattern(expression), compiled = compile_pattern(expression);
    REQUIRE(known != nullptr);
    for (int round = 0; round < 3000; ++round) {
      std::string text;
      for (size_t n = random() % 24; n > 0; --n)
        utf8_append(text, alphabet[random() % alphabet.size()]);
      std::vector<TextSpan> a, b;
      known->find_all(text, a);
      compiled->find_all(text, b);
      bool same = a.size() == b.size();
      for (size_t i = 0; same && i < a.size(); ++i)
        same = a[i].begin == b[i].begin && a[i].end == b[i].end;
      CHECK_MESSAGE(same, expression << " on " << text);
    }
  }
  CHECK(known_pattern("x") == nullptr);
  if (pattern_engine() == "plain")
    check_error("has no PCRE2", [] { compile_pattern("x+"); });
  else
    check_error("does not compile", [] { compile_pattern("(x"); });
}

TEST_CASE("a tokenizer.json that lies") {
  const auto read = [](const json& j) { return Tokenizer::from_json(j.dump()); };
  const auto with = [](const char* pointer, json value) {
    json j = small_json();
    j[json::json_pointer(pointer)] = std::move(value);
    return j;
  };
  check_error("not a valid tokenizer.json", [] { Tokenizer::from_json("{\"model\": "); });
  check_error("not a valid tokenizer.json", [] { Tokenizer::from_json("\xFF\xFE"); });
  check_error("no model", [] { Tokenizer::from_json("[]"); });
  check_error("not a valid tokenizer.json", [] { Tokenizer::from_json(std::string(200000, '[')); });
  check_error("token \"c\" is not in the vocabulary",
              [&] { read(with("/model/merges", {"a c"})); });
  check_error("token \"ba\" is not in the vocabulary",
              [&] { read(with("/model/merges", {"b a"})); });
  check_error("not two tokens", [&] { read(with("/model/merges", {"ab"})); });
  check_error("not a pair",
              [&] { read(with("/model/merges", json::array({json::array({"a"})}))); });
  check_error("outside [0,", [&] { read(with("/model/vocab/a", 2000000000)); });
  check_error("outside [0,", [&] { read(with("/model/vocab/a", -1)); });
  check_error("not an integer", [&] { read(with("/model/vocab/a", "0")); });
  check_error("the same id 1", [&] { read(with("/model/vocab/a", 1)); });
  check_error("the same id 0", [&] { read(with("/added_tokens/0/id", 0)); });
  check_error("\"Unigram\" is not supported", [&] { read(with("/model/type", "Unigram")); });
  check_error("normalizer \"Lowercase\"", [&] {
    read(with("/normalizer", {{"type", "Lowercase"}}));
  });
  check_error("neither byte-level", [&] { read(with("/pre_tokenizer", nullptr)); });
  check_error("pre-tokenizer \"Punctuation\"", [&] {
    json steps = json::array({{{"type", "Punctuation"}}, small_json()["pre_tokenizer"]});
    read(with("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", steps}}));
  });
  json deep = small_json()["pre_tokenizer"];
  for (int i = 0; i < 20; ++i)
    deep = {{"type", "Sequence"}, {"pretokenizers", json::array({deep})}};
  check_error("nested more than 8 deep", [&] { read(with("/pre_tokenizer", deep)); });
  check_error("tokenizer_config.json", [] { Tokenizer::from_json(small_json().dump(), "{"); });
  const std::string text = small_json().dump();
  for (size_t n = 0; n < text.size(); n += 7)
    CHECK_THROWS_AS(Tokenizer::from_json(text.substr(0, n)), Error);
}

// A protobuf length-delimited field.
std::string field(int number, const std::string& payload) {
  std::string out(1, static_cast<char>(number << 3 | 2));
  size_t n = payload.size();
  for (; n >= 128; n >>= 7) out += static_cast<char>(n | 128);
  return out + static_cast<char>(n) + payload;
}

std::string piece_field(const std::string& piece, float score, int type) {
  std::string bytes =
      field(1, piece) + "\x15" + std::string(4, '\0') + "\x18" + static_cast<char>(type);
  std::memcpy(bytes.data() + bytes.size() - 6, &score, 4);
  return field(1, bytes);
}

TEST_CASE("a tokenizer.model of our own, and broken ones") {
  const std::string pieces = piece_field("<unk>", 0, 2) + piece_field("<s>", 0, 3) +
                             piece_field("</s>", 0, 3) + piece_field("\u2581", -1, 1) +
                             piece_field("a", -2, 1) + piece_field("\u2581a", -3, 1) +
                             piece_field("\u2581\u2581", 0, 4);
  const std::string trainer = field(2, std::string("\x18\x02"));
  const std::string normalizer = field(3, std::string("\x18\x01\x20\x00\x28\x01", 6));
  const std::string good = pieces + trainer + normalizer;
  const Tokenizer t = Tokenizer::from_sentencepiece(good);
  CHECK(t.encode("a a") == Ids{1, 5, 5});
  CHECK(t.encode("a  a") == Ids{1, 5, 6, 5});  // the user-defined double space comes first
  CHECK(t.decode(t.encode("a  a")) == "a   a");
  const Tokenizer again = Tokenizer::from_json(t.to_tokenizer_json(), t.to_tokenizer_config_json());
  CHECK(again.encode("a  a") == t.encode("a  a"));

  const auto read = [](const std::string& bytes) { Tokenizer::from_sentencepiece(bytes); };
  check_error("the file is empty", [&] { read(""); });
  check_error("no pieces", [&] { read(trainer); });
  check_error("type 1 is not supported", [&] { read(pieces + normalizer); });
  check_error("removes extra spaces", [&] { read(pieces + trainer + field(3, "\x18\x01")); });
  check_error("rewrites characters", [&] { read(good + field(3, field(2, "x"))); });
  check_error("truncated", [&] { read(good + "\x0A\x7F"); });
  check_error("truncated", [&] { read("\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F"); });
  check_error("wire type 7", [&] { read("\x0F"); });
  check_error("more than 10 bytes", [&] { read("\x08" + std::string(11, '\x80')); });
  check_error("unknown type 9", [&] { read(piece_field("x", 0, 9)); });
  check_error("tiktoken", [&] { read("IQ== 0\nIg== 1\n"); });
  for (size_t n = 0; n < good.size(); ++n) {  // no prefix crashes; some are files of their own
    try {
      read(good.substr(0, n));
    } catch (const Error&) {
    }
  }
}

TEST_CASE("GGUF keys that lie") {
  const auto read = [](const std::function<void(TokenizerSpec&)>& change) {
    TokenizerSpec spec = small_spec(kPieces);
    change(spec);
    Tokenizer::from_spec(spec);
  };
  check_error("tokenizer.ggml.model is \"bert\"", [&] { read([](auto& s) { s.model = "bert"; }); });
  check_error("scores for", [&] { read([](auto& s) { s.scores.pop_back(); }); });
  check_error("needs tokenizer.ggml.scores", [&] { read([](auto& s) { s.scores.clear(); }); });
  check_error("NaN", [&] { read([](auto& s) { s.scores[5] = std::nanf(""); }); });
  check_error("missing or empty", [&] { read([](auto& s) { s.tokens.clear(); }); });
  check_error("token types for", [&] { read([](auto& s) { s.types = {1}; }); });
  check_error("unknown type 77",
              [&] { read([](auto& s) { s.types.assign(s.tokens.size(), 77); }); });
  check_error("not of the form",
              [&] { read([](auto& s) { s.types.assign(s.tokens.size(), 6); }); });
  check_error("bos_token_id is 100000", [&] { read([](auto& s) { s.bos_id = 100000; }); });
  const auto bytes = [](auto& s) { s.model = "gpt2", s.scores.clear(), s.merges = {"a b"}; };
  read(bytes);
  check_error("tokenizer.ggml.pre is \"tekken\"",
              [&] { read([&](auto& s) { bytes(s), s.pre = "tekken"; }); });
  check_error("token \"q\" is not", [&] { read([&](auto& s) { bytes(s), s.merges = {"a q"}; }); });
  check_error("needs tokenizer.ggml.merges",
              [&] { read([&](auto& s) { bytes(s), s.merges.clear(); }); });
}

TEST_CASE("a folder: template file, lists of ends, files written back") {
  const auto folder = std::filesystem::temp_directory_path() /
                      fmt::format("omq-tokenizer-test-{}", std::random_device{}());
  std::filesystem::create_directories(folder);
  check_error("neither tokenizer.json nor tokenizer.model",
              [&] { Tokenizer::from_folder(folder); });
  const auto write = [&](const char* name, const std::string& text) {
    std::ofstream(folder / name, std::ios::binary) << text;
  };
  const std::string text = small_json().dump(3);
  write("tokenizer.json", text);
  write("tokenizer_config.json",
        R"({"bos_token": "<e>", "add_bos_token": true, "chat_template": "old"})");
  write("chat_template.jinja", "new");
  write("config.json", R"({"eos_token_id": [6, 1], "bos_token_id": 3})");
  const Tokenizer t = Tokenizer::from_folder(folder);
  CHECK(t.chat_template() == "new");
  CHECK(t.eos_ids() == Ids{6, 1});
  CHECK(t.bos_id() == 6);
  CHECK(t.adds_bos());
  CHECK(t.to_tokenizer_json() == text);
  CHECK(json::parse(t.to_tokenizer_config_json())["chat_template"] == "new");
  CHECK(json::parse(t.to_generation_config_json())["eos_token_id"] == json({6, 1}));
  std::filesystem::remove_all(folder);
  check_error("not a folder", [&] { Tokenizer::from_folder(folder); });
}

}  // namespace
}  // namespace omq
