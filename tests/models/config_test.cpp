// ModelConfig: the four families in both spellings, GGUF keys, and what is refused.
#include "models/config.h"

#include <doctest/doctest.h>

#include "models/gguf.h"
#include "tests/models/files.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

using nlohmann::json;
using Scaling = nn::RopeScaling::Type;

json llama() {
  return json::parse(
      R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 512, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2})");
}
json with(json base, const json& changes) {
  base.update(changes);
  return base;
}
std::string refused(const json& changes, const json& base = llama()) {
  return message_of([&] { (void)ModelConfig::from_hf(with(base, changes), "x/config.json"); });
}

}  // namespace

TEST_CASE("config: llama and its defaults") {
  const ModelConfig c = ModelConfig::from_hf(llama());
  CHECK(c.model_type == "llama");
  CHECK(c.head_dim == 8);
  CHECK(c.num_kv_heads == 4);
  CHECK(c.q_size() == 64);
  CHECK(c.kv_size() == 32);
  CHECK(c.rope_theta == 10000.0);
  CHECK(c.rope_scaling.type == Scaling::None);
  CHECK_FALSE((c.tie_word_embeddings || c.attention_bias || c.attention_out_bias || c.mlp_bias ||
               c.qk_norm));
  CHECK(c.sliding_window == 0);
  CHECK(c.usable_context() == 2048);
  CHECK(c.quantization.is_null());
  CHECK(c.to_hf_json() == llama());
  json j = llama();
  for (const char* key : {"num_key_value_heads", "bos_token_id", "eos_token_id", "rms_norm_eps"})
    j.erase(key);
  const ModelConfig d = ModelConfig::from_hf(j);
  CHECK(d.num_kv_heads == 8);
  CHECK(d.bos_token_id == 1);
  CHECK(d.eos_token_ids == std::vector<int64_t>{2});
  CHECK(d.rms_norm_eps == 1e-6);
}

TEST_CASE("config: biases, tied head, several end tokens, quantization kept as it is") {
  const json q = {{"quant_method", "omq"}, {"bits", 4}};
  const ModelConfig c = ModelConfig::from_hf(with(llama(), {{"attention_bias", true},
                                                            {"mlp_bias", true},
                                                            {"tie_word_embeddings", true},
                                                            {"eos_token_id", {7, 2, 7}},
                                                            {"bos_token_id", nullptr},
                                                            {"head_dim", 16},
                                                            {"quantization_config", q}}));
  CHECK((c.attention_bias && c.attention_out_bias && c.mlp_bias && c.tie_word_embeddings));
  CHECK(c.eos_token_ids == std::vector<int64_t>{7, 2});
  CHECK_FALSE(c.bos_token_id.has_value());
  CHECK(c.q_size() == 128);
  CHECK(c.quantization == q);
}

TEST_CASE("config: rope scaling in its spellings") {
  const json llama3 = {{"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 4096}};
  const json old = with(
      llama(), {{"rope_theta", 5e5}, {"rope_scaling", with(llama3, {{"rope_type", "llama3"}})}});
  const json v5 = with(
      llama(), {{"rope_parameters", with(llama3, {{"rope_type", "llama3"}, {"rope_theta", 5e5}})}});
  for (const json& j : {old, v5}) {
    const ModelConfig c = ModelConfig::from_hf(j);
    CHECK(c.rope_theta == 5e5);
    CHECK(c.rope_scaling.type == Scaling::Llama3);
    CHECK(c.rope_scaling.factor == 8.0);
    CHECK(c.rope_scaling.high_freq_factor == 4.0);
    CHECK(c.rope_scaling.original_max_positions == 4096);
  }
  const ModelConfig linear =
      ModelConfig::from_hf(with(llama(), {{"rope_scaling", {{"type", "linear"}, {"factor", 2}}}}));
  CHECK(linear.rope_scaling.type == Scaling::Linear);
  CHECK(linear.rope_scaling.factor == 2.0);
  CHECK(ModelConfig::from_hf(with(llama(), {{"rope_scaling", nullptr}})).rope_scaling.type ==
        Scaling::None);
  CHECK(contains(refused({{"rope_scaling", {{"type", "yarn"}, {"factor", 2}}}}),
                 "rope type \"yarn\" is not supported"));
  CHECK(contains(refused({{"rope_scaling", {{"type", "linear"}}}}),
                 "rope_scaling: the key factor is missing"));
  CHECK(contains(refused({{"rope_scaling", "linear"}}), "rope_scaling: an object is expected"));
  CHECK(contains(
      refused({{"rope_scaling", with(llama3, {{"rope_type", "llama3"}, {"high_freq_factor", 1}})}}),
      "high_freq_factor 1 is not above low_freq_factor 1"));
  CHECK(contains(refused({{"rope_parameters", {{"full_attention", json::object()}}}}),
                 "per layer type"));
  CHECK(contains(refused({{"partial_rotary_factor", 0.5}}), "partial_rotary_factor 0.5"));
  CHECK(contains(refused({{"rope_theta", 0}}), "rope_theta is 0, a number above 0"));
}

TEST_CASE("config: mistral, qwen2, qwen3") {
  json mistral =
      with(llama(), {{"model_type", "mistral"}, {"architectures", {"MistralForCausalLM"}}});
  CHECK(ModelConfig::from_hf(mistral).sliding_window == 4096);  // the family's default
  mistral["sliding_window"] = nullptr;
  CHECK(ModelConfig::from_hf(mistral).sliding_window == 0);
  mistral["sliding_window"] = 1024;
  const ModelConfig windowed = ModelConfig::from_hf(mistral);
  CHECK(windowed.usable_context() == 1024);
  windowed.check_context(1024);
  CHECK(contains(message_of([&] { windowed.check_context(1025); }), "sliding window of 1024"));
  mistral.erase("num_key_value_heads");
  CHECK(contains(refused(json::object(), mistral), "the key num_key_value_heads is missing"));

  json qwen2 = with(
      llama(),
      {{"model_type", "qwen2"}, {"architectures", {"Qwen2ForCausalLM"}}, {"sliding_window", 128}});
  qwen2.erase("bos_token_id");
  const ModelConfig q2 = ModelConfig::from_hf(qwen2);
  CHECK(q2.attention_bias);
  CHECK_FALSE((q2.attention_out_bias || q2.qk_norm));
  CHECK(q2.sliding_window == 0);  // off unless use_sliding_window
  CHECK_FALSE(q2.bos_token_id.has_value());
  qwen2["use_sliding_window"] = true;
  CHECK(ModelConfig::from_hf(qwen2).sliding_window == 128);
  qwen2["layer_types"] = json::array({"full_attention", "full_attention"});
  CHECK(ModelConfig::from_hf(qwen2).sliding_window == 0);
  qwen2["layer_types"] = json::array({"linear_attention"});
  CHECK(
      contains(refused(json::object(), qwen2), "layer type \"linear_attention\" is not supported"));

  json qwen3 =
      with(llama(),
           {{"model_type", "qwen3"}, {"architectures", {"Qwen3ForCausalLM"}}, {"head_dim", 32}});
  const ModelConfig q3 = ModelConfig::from_hf(qwen3);
  CHECK((q3.qk_norm && !q3.attention_bias));
  CHECK(q3.head_dim == 32);
  qwen3.erase("head_dim");
  CHECK(ModelConfig::from_hf(qwen3).head_dim == 128);
}

TEST_CASE("config: unknown models say what they are and what is supported") {
  const std::string unknown =
      refused({{"model_type", "gpt2"}, {"architectures", {"GPT2LMHeadModel"}}});
  CHECK(contains(unknown,
                 "x/config.json: unknown model: architectures GPT2LMHeadModel, model_type gpt2"));
  CHECK(contains(unknown, "llama, mistral, qwen2, qwen3"));
  CHECK(
      contains(refused({{"architectures", {"LlamaForSequenceClassification"}}}),
               "architecture LlamaForSequenceClassification (model_type llama) is not supported"));
  CHECK(contains(refused({{"architectures", 3}}), "a list of names is expected"));
  CHECK(refused({{"architectures", {"LLaMAForCausalLM"}}}) == "");
  json bare = llama();
  bare.erase("model_type");
  CHECK(ModelConfig::from_hf(bare).model_type == "llama");  // the architecture says enough
  bare.erase("architectures");
  CHECK(contains(refused(json::object(), bare), "architectures (none), model_type (none)"));
  CHECK(contains(message_of([] { (void)ModelConfig::from_hf(json::array(), "c"); }),
                 "c: an object is expected"));
}

TEST_CASE("config: keys that are missing, of the wrong kind, or out of range") {
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "vocab_size"}) {
    json j = llama();
    j.erase(key);
    CHECK(refused(json::object(), j) == fmt::format("x/config.json: the key {} is missing", key));
    for (const json& bad : {json(0), json(-1), json(1e9), json("64"), json(std::vector<int>{1}),
                            json(uint64_t{1} << 63), json(int64_t{1} << 40)}) {
      CHECK(
          contains(refused({{key, bad}}), fmt::format("x/config.json: {} is {}", key, bad.dump())));
    }
  }
  CHECK(contains(refused({{"num_key_value_heads", 3}}),
                 "num_attention_heads 8 is not a multiple of num_key_value_heads 3"));
  CHECK(contains(refused({{"hidden_size", 65}}), "hidden_size 65 is not a multiple"));
  CHECK(contains(refused({{"head_dim", 7}}), "head_dim 7 is odd"));
  CHECK(contains(refused({{"rms_norm_eps", 0}}), "rms_norm_eps is 0"));
  CHECK(contains(refused({{"rms_norm_eps", "x"}}), "rms_norm_eps is \"x\", a number is expected"));
  CHECK(contains(refused({{"hidden_act", "gelu"}}), "hidden_act \"gelu\" is not supported"));
  CHECK(contains(refused({{"tie_word_embeddings", 1}}), "true or false is expected"));
  CHECK(contains(refused({{"eos_token_id", "x"}}), "a token id or a list of them is expected"));
  CHECK(contains(refused({{"quantization_config", 4}}), "quantization_config is not an object"));
}

TEST_CASE("config: the reference checkpoints read alike in both spellings") {
  for (const char* name : {"llama3-sharded", "mistral", "qwen2", "qwen3"}) {
    CAPTURE(name);
    const auto folder = source_path("tests/golden") / name;
    const ModelConfig a = ModelConfig::from_hf_file(folder / "config.json");
    const ModelConfig b = ModelConfig::from_hf_file(folder / "config-v5.json");
    CHECK(a.rope_theta == b.rope_theta);
    CHECK(a.rope_scaling.type == b.rope_scaling.type);
    CHECK(a.rope_scaling.factor == b.rope_scaling.factor);
    CHECK(a.head_dim == b.head_dim);
    CHECK(a.num_kv_heads == b.num_kv_heads);
    CHECK(a.sliding_window == b.sliding_window);
    CHECK(a.sliding_window == 0);
    CHECK(a.tie_word_embeddings == b.tie_word_embeddings);
    CHECK(a.eos_token_ids == b.eos_token_ids);
    CHECK(a.rms_norm_eps == b.rms_norm_eps);
  }
}

namespace {
ModelConfig of_gguf(const TempDir& dir, const GgufBuilder& b) {
  return ModelConfig::from_gguf(GgufFile(write_file(dir / "m.gguf", b.build())));
}
}  // namespace

TEST_CASE("config: from GGUF keys, and out again as config.json") {
  TempDir dir;
  for (const char* arch : {"llama", "qwen2", "qwen3"}) {
    CAPTURE(arch);
    GgufBuilder builder = tiny_gguf(arch);
    builder.u32("tokenizer.ggml.eot_token_id", 5);
    if (std::string_view(arch) == "qwen2")
      builder.f32_tensor("blk.0.attn_q.bias", {4}, {1, 2, 3, 4});
    if (std::string_view(arch) == "qwen3")
      builder.f32_tensor("blk.0.attn_q_norm.weight", {2}, {1, 2});
    const ModelConfig c = of_gguf(dir, builder);
    CHECK(c.model_type == arch);
    CHECK(c.hidden_size == 4);
    CHECK(c.intermediate_size == 8);
    CHECK(c.num_layers == 1);
    CHECK(c.head_dim == 2);
    CHECK(c.vocab_size == 6);
    CHECK(c.rms_norm_eps == 1e-5);  // exactly: not the F32 next to it
    CHECK(c.rope_theta == 5e5);
    CHECK(c.tie_word_embeddings);
    CHECK(c.bos_token_id == 1);
    CHECK(c.eos_token_ids == std::vector<int64_t>{2, 5});
    const ModelConfig d = ModelConfig::from_hf(c.to_hf_json());
    CHECK(d.model_type == c.model_type);
    CHECK(d.head_dim == c.head_dim);
    CHECK(d.num_kv_heads == 1);
    CHECK(d.attention_bias == c.attention_bias);
    CHECK(d.attention_bias == (std::string_view(arch) == "qwen2"));
    CHECK(d.qk_norm == c.qk_norm);
    CHECK(d.eos_token_ids == c.eos_token_ids);
    CHECK(d.rope_theta == c.rope_theta);
    CHECK(d.sliding_window == 0);
    CHECK(d.max_position_embeddings == 32);
  }
  CHECK_FALSE(of_gguf(dir, tiny_gguf("llama", /*tied=*/false)).tie_word_embeddings);
}

TEST_CASE("config: GGUF rope scaling, by key and by divisors") {
  TempDir dir;
  GgufBuilder linear = tiny_gguf();
  linear.text("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 4);
  CHECK(of_gguf(dir, linear).rope_scaling.factor == 4.0);
  GgufBuilder yarn = tiny_gguf();
  yarn.text("llama.rope.scaling.type", "yarn");
  CHECK(
      contains(message_of([&] { of_gguf(dir, yarn); }), "rope scaling \"yarn\" is not supported"));

  // Heads of 64 have wavelengths on both sides of both borders.
  const nn::RopeScaling rule{.type = Scaling::Llama3, .factor = 8.0};
  const auto plain = nn::rope_frequencies(64, 5e5, {}),
             scaled = nn::rope_frequencies(64, 5e5, rule);
  std::vector<float> divisors, odd;
  for (size_t i = 0; i < plain.size(); ++i)
    divisors.push_back(static_cast<float>(plain[i] / scaled[i]));
  CHECK(divisors.front() == 1.0f);
  CHECK(divisors.back() == 8.0f);
  GgufBuilder b = tiny_gguf();
  b.u32("llama.attention.key_length", 64).f32_tensor("rope_freqs.weight", {32}, divisors);
  const ModelConfig c = of_gguf(dir, b);
  CHECK(c.rope_scaling.type == Scaling::Llama3);
  CHECK(c.rope_scaling.factor == 8.0);
  CHECK(c.rope_divisors.empty());
  CHECK(c.to_hf_json().at("rope_scaling").at("rope_type") == "llama3");
  divisors[3] = 2.5f;  // no rule any more: kept as they are
  GgufBuilder free = tiny_gguf();
  free.u32("llama.attention.key_length", 64).f32_tensor("rope_freqs.weight", {32}, divisors);
  const ModelConfig d = of_gguf(dir, free);
  CHECK(d.rope_scaling.type == Scaling::None);
  CHECK(d.rope_divisors == divisors);
  CHECK(contains(message_of([&] { (void)d.to_hf_json(); }), "no rule that config.json can name"));
}

TEST_CASE("config: GGUF models that are refused") {
  TempDir dir;
  const auto refused_gguf = [&](const GgufBuilder& b) {
    return message_of([&] { of_gguf(dir, b); });
  };
  CHECK(contains(refused_gguf(GgufBuilder()), "general.architecture is missing"));
  CHECK(contains(refused_gguf(GgufBuilder().text("general.architecture", "gpt2")),
                 "architecture \"gpt2\" is not supported (llama, qwen2 and qwen3 are)"));
  CHECK(contains(refused_gguf(GgufBuilder().text("general.architecture", "llama")),
                 "the key llama.embedding_length is missing"));
  CHECK(contains(refused_gguf(tiny_gguf().u32("llama.expert_count", 8)), "mixtures of experts"));
  CHECK(
      contains(refused_gguf(tiny_gguf().u32("llama.rope.dimension_count", 1)), "part of the head"));
  CHECK(contains(refused_gguf(tiny_gguf().u32("llama.attention.value_length", 4)),
                 "of different sizes"));
  CHECK(contains(refused_gguf(tiny_gguf().u32("split.count", 3)), "one part of a split model"));
  CHECK(contains(refused_gguf(tiny_gguf().text("llama.attention.key_length", "x")),
                 "is of kind string"));
}

}  // namespace omq
