// Tokenizers against published token ids: Llama-2 (SentencePiece), Llama-3 and SmolLM2 (byte-level
// BPE).
//
// The vectors are llama.cpp's 47 strings; the WikiText-2 count is that on which llama.cpp and
// Hugging Face agree. Small hand-made vocabularies cover what those models do not use.

#include "models/tokenizer.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tensor/error.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

using Ids = std::vector<int32_t>;
using nlohmann::json;

std::string slurp(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string gunzip(const std::filesystem::path& path) {
  std::string out;
  FILE* pipe = popen(fmt::format("gzip -dc '{}'", path.string()).c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[65536];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) out.append(buffer, n);
  REQUIRE(pclose(pipe) == 0);
  return out;
}

struct Vector {
  std::string text;
  Ids ids;
};

std::vector<Vector> read_vectors(const std::filesystem::path& inputs,
                                 const std::filesystem::path& outputs) {
  const std::string text = slurp(inputs), separator = "\n__ggml_vocab_test__\n";
  std::istringstream lines(slurp(outputs));
  std::vector<Vector> vectors;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.size(), text.find(separator, at));
    Vector v{text.substr(at, end - at), {}};
    std::string line;
    std::getline(lines, line);  // the last line, of an empty text, may be missing
    std::istringstream numbers(line);
    for (int32_t id; numbers >> id;) v.ids.push_back(id);
    vectors.push_back(std::move(v));
    at = end + separator.size();
  }
  return vectors;
}

// A tokenizer of the reference data with its vectors, or nothing (and a message) without the data.
struct Reference {
  std::vector<Vector> vectors;
  std::string tokenizer, config;
};

std::optional<Reference> reference(std::string_view name) {
  const auto folder = shared_path(fmt::format("data/tokenizer-{}", name));
  if (!folder) {
    MESSAGE("skipped: no shared/data/tokenizer-" << name);
    return {};
  }
  const bool llama2 = name == "llama2", smollm2 = name == "smollm2";
  const std::string base = llama2    ? "ggml-vocab-llama-spm.gguf"
                           : smollm2 ? "smollm2"
                                     : "ggml-vocab-llama-bpe.gguf";
  Reference r;
  r.vectors = read_vectors(*folder / (base + ".inp"), *folder / (base + ".out"));
  REQUIRE(r.vectors.size() == 47);
  r.tokenizer = llama2 ? slurp(*folder / "tokenizer.model") : gunzip(*folder / "tokenizer.json.gz");
  if (!llama2) r.config = slurp(*folder / "tokenizer_config.json");
  return r;
}

void check_vectors(const Tokenizer& tokenizer, const std::vector<Vector>& vectors) {
  for (const Vector& v : vectors) {
    CAPTURE(v.text);
    CHECK(tokenizer.encode(v.text, {.add_bos = false}) == v.ids);
    CHECK(tokenizer.decode(v.ids) == v.text);
    StreamDecoder stream(tokenizer, {.start_of_text = true});
    std::string streamed;
    for (const int32_t id : v.ids) streamed += stream.push(id);
    CHECK(streamed + stream.flush() == v.text);
  }
}

// The keys of a GGUF file, from the tokenizer.json of the same model.
TokenizerSpec spec_of_json(const std::string& text, std::string pre) {
  const json root = json::parse(text);
  TokenizerSpec spec;
  spec.model = "gpt2";
  spec.pre = std::move(pre);
  spec.tokens.resize(root["model"]["vocab"].size());
  for (const auto& [piece, id] : root["model"]["vocab"].items()) spec.tokens[id] = piece;
  spec.types.assign(spec.tokens.size(), 1);
  for (const json& token : root["added_tokens"]) {
    const size_t id = token["id"];
    if (id >= spec.tokens.size()) spec.tokens.resize(id + 1), spec.types.resize(id + 1, 1);
    spec.tokens[id] = token["content"];
    spec.types[id] = 3;
  }
  for (const json& merge : root["model"]["merges"])
    spec.merges.push_back(merge.is_string()
                              ? merge.get<std::string>()
                              : merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  return spec;
}

// A llama2.c tokenizer.bin: i32 longest piece, then f32 score, i32 length, bytes for each piece.
TokenizerSpec spec_of_bin(const std::string& bytes, size_t count) {
  TokenizerSpec spec;
  spec.model = "llama";
  size_t at = 4;
  for (size_t id = 0; id < count; ++id) {
    float score;
    int32_t length;
    std::memcpy(&score, &bytes.at(at), 4);
    std::memcpy(&length, &bytes.at(at + 4), 4);
    std::string piece = bytes.substr(at + 8, length);
    at += 8 + length;
    for (size_t space; (space = piece.find(' ')) != piece.npos;) piece.replace(space, 1, "\u2581");
    if (id < 3) piece = id == 0 ? "<unk>" : id == 1 ? "<s>" : "</s>";
    spec.tokens.push_back(piece);
    spec.scores.push_back(score);
  }
  return spec;
}

TEST_CASE("SmolLM2: vectors, WikiText-2, files") {
  const auto r = reference("smollm2");
  if (!r) return;
  const Tokenizer t = Tokenizer::from_json(r->tokenizer, r->config);
  check_vectors(t, r->vectors);
  CHECK(t.vocab_size() == 49152);
  CHECK(t.bos_id() == 1);
  CHECK(t.eos_ids() == Ids{2});
  CHECK_FALSE(t.adds_bos());
  CHECK(t.chat_template().find("SmolLM") != std::string::npos);
  CHECK(t.to_tokenizer_json() == r->tokenizer);
  CHECK(t.to_tokenizer_config_json() == r->config);
  CHECK(t.encode("<|im_start|>user\nHi") == Ids{1, 4093, 198, 26843});
  CHECK(t.encode("<|im_start|>", {.parse_special = false}).size() > 1);
  const auto wiki = shared_path("data/wikitext2/wiki.test.raw");
  if (!wiki) {
    MESSAGE("skipped: no shared/data/wikitext2");
    return;
  }
  const std::string text = slurp(*wiki);
  const Ids ids = t.encode(text);
  CHECK(ids.size() == 303415);
  CHECK(t.decode(ids) == text);

  TokenizerSpec spec = spec_of_json(r->tokenizer, "smollm");
  spec.bos_id = 1, spec.eos_id = 2, spec.chat_template = t.chat_template();
  const Tokenizer gguf = Tokenizer::from_spec(spec);
  CHECK(gguf.encode(text) == ids);
  const Tokenizer again =
      Tokenizer::from_json(gguf.to_tokenizer_json(), gguf.to_tokenizer_config_json());
  CHECK(again.encode(text) == ids);
  CHECK(again.eos_ids() == Ids{2});
  CHECK(again.bos_id() == 1);
  CHECK_FALSE(again.adds_bos());
  CHECK(again.chat_template() == t.chat_template());
}

TEST_CASE("Llama-3: vectors, also from GGUF keys") {
  const auto r = reference("llama3");
  if (!r) return;
  const Tokenizer t = Tokenizer::from_json(r->tokenizer, r->config);
  check_vectors(t, r->vectors);
  CHECK(t.vocab_size() == 128256);
  CHECK(t.bos_id() == 128000);
  CHECK(t.encode("<|eot_id|>a") == Ids{128009, 64});
  CHECK(t.ends_text(128009));
  TokenizerSpec spec = spec_of_json(r->tokenizer, "llama-bpe");
  spec.bos_id = 128000, spec.eos_id = 128001, spec.eot_id = 128009;
  const Tokenizer gguf = Tokenizer::from_spec(std::move(spec));
  check_vectors(gguf, r->vectors);
  CHECK(gguf.adds_bos());
  CHECK(gguf.encode("a") == Ids{128000, 64});
  const Tokenizer again = Tokenizer::from_json(
      gguf.to_tokenizer_json(), gguf.to_tokenizer_config_json(), gguf.to_generation_config_json());
  check_vectors(again, r->vectors);
  CHECK(again.adds_bos());
  CHECK(again.eos_ids() == Ids{128001, 128009});
}

TEST_CASE("Llama-2: vectors from tokenizer.model, from scores, from the tokenizer.json we write") {
  const auto r = reference("llama2");
  if (!r) return;
  const Tokenizer t = Tokenizer::from_sentencepiece(r->tokenizer);
  check_vectors(t, r->vectors);
  CHECK(t.vocab_size() == 32000);
  CHECK(t.adds_bos());
  CHECK(t.encode("Hello") == Ids{1, 15043});
  CHECK(t.encode("</s>", {.add_bos = false}) == Ids{2});
  CHECK(t.token_bytes(13) == "\n");
  const auto bin = shared_path("data/tokenizer-llama2/tokenizer.bin");
  REQUIRE(bin.has_value());
  check_vectors(Tokenizer::from_spec(spec_of_bin(slurp(*bin), 32000)), r->vectors);
  const Tokenizer again = Tokenizer::from_json(t.to_tokenizer_json(), t.to_tokenizer_config_json());
  check_vectors(again, r->vectors);
  CHECK(again.adds_bos());
  CHECK(again.eos_ids() == Ids{2});
  if (const auto wiki = shared_path("data/wikitext2/wiki.test.raw")) {
    const std::string text = slurp(*wiki);
    const Ids ids = t.encode(text);
    CHECK(ids.size() == 335688);
    CHECK(again.encode(text) == ids);
    CHECK(t.decode(ids) == text);
  }
}

TEST_CASE("stories260K: 512 pieces with true scores") {
  const auto bin = shared_path("data/model-stories260k/tok512.bin");
  const auto stories = shared_path("data/tinystories/tinystories_valid_head.txt");
  if (!bin || !stories) {
    MESSAGE("skipped: no shared/data/model-stories260k");
    return;
  }
  const Tokenizer t = Tokenizer::from_spec(spec_of_bin(slurp(*bin), 512));
  const std::string text = slurp(*stories);
  const Ids ids = t.encode(text);
  CHECK(t.decode(ids) == text);
  const Tokenizer again = Tokenizer::from_json(t.to_tokenizer_json());
  CHECK(again.encode(text) == ids);
}

}  // namespace
}  // namespace omq
