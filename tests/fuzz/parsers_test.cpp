// Every parser of model files against small valid files with random damage: each must give a result
// or an Error, and with the asan preset nothing else may show. Seeded, so that a failure can be
// repeated; the libFuzzer programs in libfuzzer/ go on from here for as long as one likes.
#include <doctest/doctest.h>

#include <random>
#include <string>

#include "tests/fuzz/targets.h"
#include "tests/models/files.h"

namespace omq {
namespace {

// One to four changes: a byte, a bit, a number of 4 or 8 bytes, a cut, a repetition, a removal.
std::string mutate(std::string s, std::mt19937_64& random) {
  constexpr uint64_t kInteresting[] = {0,
                                       1,
                                       2,
                                       7,
                                       8,
                                       31,
                                       32,
                                       255,
                                       256,
                                       65535,
                                       1u << 31,
                                       0xFFFFFFFFu,
                                       uint64_t{1} << 40,
                                       uint64_t{1} << 62,
                                       uint64_t{1} << 63,
                                       ~uint64_t{0}};
  const auto below = [&](size_t n) { return n > 0 ? static_cast<size_t>(random() % n) : 0; };
  for (size_t change = 1 + below(4); change > 0 && !s.empty(); --change) {
    const size_t at = below(s.size());
    switch (below(7)) {
      case 0:
        s[at] = static_cast<char>(random());
        break;
      case 1:
        s[at] = static_cast<char>(s[at] ^ (1 << below(8)));
        break;
      case 2:
      case 3: {
        const size_t width = below(2) ? 8 : 4;
        const uint64_t v = kInteresting[below(std::size(kInteresting))];
        if (at + width <= s.size()) std::memcpy(s.data() + at, &v, width);
        break;
      }
      case 4:
        s.resize(at);
        break;
      case 5:
        s.insert(at, s.substr(below(s.size()), below(40)));
        break;
      default:
        s.erase(at, below(16));
    }
  }
  return s;
}

// Damages `seed` n times; returns how many results were accepted.
template <class F> size_t survive(const std::string& seed, int n, F&& target) {
  REQUIRE(target(seed));
  std::mt19937_64 random(20240607);
  size_t accepted = 0;
  for (int i = 0; i < n; ++i) {
    CAPTURE(i);
    accepted += target(mutate(seed, random));
  }
  return accepted;
}

std::string sample_safetensors(const Metadata& metadata) {
  TempDir dir;
  SafetensorsWriter w(dir / "m", metadata);
  w.add("model.norm.weight", Tensor::from<float>({1, 2, 3, 4}, {4}));
  w.add("codes", Tensor::from<uint8_t>({1, 2, 3}, {3}));
  w.add("empty", Tensor::from<int32_t>({}, {0, 3}));
  w.finish();
  return read_file(dir / "m");
}

constexpr const char* kConfig =
    R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":4,"intermediate_size":8,)"
    R"("num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"vocab_size":6,"eos_token_id":[2,3],)"
    R"("rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,)"
    R"("original_max_position_embeddings":8192},"max_position_embeddings":64,"sliding_window":null})";

constexpr const char* kTokenizer =
    R"({"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]},"pre_tokenizer":)"
    R"({"type":"ByteLevel","add_prefix_space":false},"decoder":{"type":"ByteLevel"},"added_tokens":[]})";

}  // namespace

TEST_CASE("fuzz: safetensors") {
  const size_t accepted = survive(sample_safetensors({{"a", "b"}}), 4000, fuzz::safetensors);
  CHECK(accepted > 0);  // damage to the data only
  CHECK(accepted < 4000);
}

TEST_CASE("fuzz: GGUF") {
  // One tensor of every decoded type beside a whole model.
  GgufBuilder b = tiny_gguf();
  for (const uint32_t type : {1u, 2u, 3u, 6u, 7u, 8u, 10u, 11u, 12u, 13u, 14u, 30u}) {
    const GgmlType* t = find_ggml_type(type);
    b.tensor(t->name, {static_cast<uint64_t>(t->values)}, type,
             std::string(static_cast<size_t>(t->bytes), 'a'));
  }
  CHECK(survive(b.build(), 4000, fuzz::gguf) > 0);
}

TEST_CASE("fuzz: whole checkpoints") {
  const auto with_tokenizer = [](std::string_view s) { return fuzz::checkpoint(s, true); };
  CHECK(survive(tiny_gguf().build(), 3000, with_tokenizer) > 0);
  const Metadata metadata = {
      {"omq_format", "1"}, {"config.json", kConfig}, {"tokenizer.json", kTokenizer}};
  CHECK(survive(sample_safetensors(metadata), 3000, with_tokenizer) > 0);
}

TEST_CASE("fuzz: config.json") { survive(kConfig, 4000, fuzz::config); }

}  // namespace omq
