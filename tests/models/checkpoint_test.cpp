// Checkpoints: every container opens by content and gives the same tensors under the same names.
#include "models/checkpoint.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "models/hash.h"
#include "models/safetensors.h"
#include "tests/models/files.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string open_message(const fs::path& p) {
  return message_of([&] { (void)open_checkpoint(p); });
}

json tiny_config() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 4},
          {"intermediate_size", 8},
          {"num_hidden_layers", 1},
          {"num_attention_heads", 2},
          {"vocab_size", 6}};
}

// Two shards and an index; one tensor of each.
void write_shards(const fs::path& folder) {
  fs::create_directories(folder);
  write_file(folder / "config.json", tiny_config().dump());
  json map;
  for (int i = 0; i < 2; ++i) {
    const std::string file = fmt::format("model-0000{}-of-00002.safetensors", i + 1);
    SafetensorsWriter w(folder / file);
    const std::string name = i ? "model.norm.weight" : "model.embed_tokens.weight";
    w.add(name, Tensor::from<float>({1.0f + static_cast<float>(i), 2}, {2}));
    w.finish();
    map[name] = file;
  }
  write_file(folder / "model.safetensors.index.json",
             json{{"metadata", {{"total_size", 16}}}, {"weight_map", map}}.dump());
}

constexpr const char* kTokenizer =
    R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}, "decoder": {"type": "ByteLevel"}, "added_tokens": []})";

}  // namespace

TEST_CASE("checkpoint: sharded folder") {
  TempDir dir;
  write_shards(dir / "m");
  write_file(dir / "m/generation_config.json", R"({"eos_token_id": [9, 2]})");
  const auto c = open_checkpoint(dir / "m");
  CHECK(c->container() == "safetensors");
  CHECK(c->names() == std::vector<std::string>{"model.embed_tokens.weight", "model.norm.weight"});
  CHECK(c->get("model.norm.weight").to_vector<float>() == std::vector<float>{2, 2});
  CHECK(c->get("model.norm.weight", {2}).dtype() == DType::F32);
  CHECK(c->meta("model.norm.weight").bytes == 8);
  CHECK(c->config().eos_token_ids == std::vector<int64_t>{2, 9});
  CHECK(c->files().size() == 3);
  CHECK(c->unused({"model.norm.weight"}) == std::vector<std::string>{"model.embed_tokens.weight"});
  const std::string missing = message_of([&] { (void)c->get("model.norms.weight"); });
  CHECK(contains(missing, (dir / "m").string()));
  CHECK(contains(
      missing,
      "no tensor model.norms.weight; the nearest of its 2 tensors are: model.norm.weight"));
  CHECK(contains(message_of([&] { (void)c->get("model.norm.weight", {4}); }),
                 "tensor model.norm.weight has shape [2], the configuration asks for [4]"));
}

TEST_CASE("checkpoint: what can be wrong with a folder") {
  TempDir dir;
  CHECK(contains(open_message(dir / "none"), "no such file or folder"));
  CHECK(contains(open_message(dir.path()), "no model here"));
  write_file(dir / "pytorch_model.bin", "PK");
  CHECK(contains(open_message(dir.path()), "only PyTorch (pickle) files"));
  CHECK(contains(open_message(dir / "pytorch_model.bin"), "a PyTorch (pickle) file"));
  write_file(dir / "text", "hello there");
  CHECK(contains(open_message(dir / "text"),
                 "neither GGUF nor safetensors; the file begins with \"hello th"));
  write_file(dir / "empty", "");
  CHECK(contains(open_message(dir / "empty"), "neither GGUF nor safetensors"));

  write_shards(dir / "m");
  fs::remove(dir / "m/config.json");
  CHECK(contains(open_message(dir / "m"), "holds safetensors but no config.json"));
  write_file(dir / "m/config.json", "{\"a\": 1, \"a\": 2}");
  CHECK(contains(open_message(dir / "m"), "key \"a\" is given twice"));
  write_file(dir / "m/config.json", tiny_config().dump());
  const fs::path index = dir / "m/model.safetensors.index.json";
  const std::string good = read_file(index);
  for (const auto& [text, message] : std::vector<std::pair<std::string, std::string>>{
           {"{}", "weight_map"},
           {"[]", "a JSON object is expected"},
           {R"({"weight_map": {"a": 1}})", "a is in 1, a file name is expected"},
           {R"({"weight_map": {"a": "../secret"}})", "a file name is expected"},
           {R"({"weight_map": {"a": ".."}})", "a file name is expected"},
           {R"({"weight_map": {"a": "none.safetensors"}})",
            "none.safetensors that its index names is missing"},
           {R"({"weight_map": {"a": "model-00001-of-00002.safetensors"}})",
            "tensor a is not in model-00001"}}) {
    write_file(index, text);
    CAPTURE(text);
    CHECK(contains(open_message(dir / "m"), message));
  }
  fs::remove(index);
  CHECK(
      contains(open_message(dir / "m"), "2 safetensors files, but neither model.safetensors nor"));
  write_file(index, good);
  write_file(dir / "m/model-00002-of-00002.safetensors", "short");
  CHECK(contains(open_message(dir / "m"), "model-00002-of-00002.safetensors: 5 bytes are too few"));
}

TEST_CASE("checkpoint: values that are not finite") {
  TempDir dir;
  write_shards(dir / "m");
  SafetensorsWriter w(dir / "m/model.safetensors");
  std::vector<float> v(200'000, 1.0f);
  v[150'000] = std::numeric_limits<float>::quiet_NaN();
  v[199'999] = std::numeric_limits<float>::infinity();
  w.add("a", Tensor::from<float>(v, {200'000}));
  w.add("h", "F16", {2}, std::as_bytes(std::span("\x00\x3c\x00\x7c", 4)));
  w.add("b", "BF16", {2}, std::as_bytes(std::span("\x80\x3f\x80\xff", 4)));
  w.add("codes", Tensor::from<uint8_t>({255, 255}, {2}));
  w.finish();
  const auto c = open_checkpoint(dir / "m");  // model.safetensors goes before an index
  CHECK(contains(message_of([&] { (void)c->get("a", {200'000}); }),
                 "tensor a: value 150000 of 200000 is nan"));
  CHECK(contains(message_of([&] { (void)c->get("h", {2}); }), "tensor h: value 1 of 2 is inf"));
  CHECK(contains(message_of([&] { (void)c->get("b", {2}); }), "tensor b: value 1 of 2 is -inf"));
  CHECK(c->get("codes", {2}).numel() == 2);
}

TEST_CASE("checkpoint: one safetensors file that carries everything") {
  TempDir dir;
  const auto write = [&](const Metadata& m, const char* name) {
    SafetensorsWriter w(dir / name, m);
    w.add("model.norm.weight", Tensor::from<float>({1, 2, 3, 4}, {4}));
    w.finish();
    return dir / name;
  };
  const Metadata whole = {{"omq_format", "1"},
                          {"config.json", tiny_config().dump()},
                          {"tokenizer.json", kTokenizer},
                          {"tokenizer_config.json", R"({"bos_token": null})"},
                          {"generation_config.json", R"({"eos_token_id": 1})"}};
  const auto c = open_checkpoint(write(whole, "m.bin"));  // by content, not by extension
  CHECK(c->container() == "safetensors (one file)");
  CHECK(c->config().hidden_size == 4);
  CHECK(c->config().eos_token_ids == std::vector<int64_t>{2, 1});
  CHECK(c->get("model.norm.weight").to_vector<float>() == std::vector<float>{1, 2, 3, 4});
  CHECK(c->tokenizer().encode("abb") == std::vector<int32_t>{2, 1});
  const auto side = c->side_files();
  CHECK(side.at("tokenizer.json") == kTokenizer);
  CHECK(side.at("generation_config.json") == R"({"eos_token_id": 1})");
  CHECK_FALSE(side.contains("config.json"));

  Metadata later = whole;
  later["omq_format"] = "2";
  CHECK(contains(open_message(write(later, "later")),
                 "omq_format is \"2\", this program reads \"1\""));
  CHECK(contains(open_message(write({}, "bare")), "without configuration; pass the folder"));
  Metadata half = whole;
  half.erase("config.json");
  CHECK(contains(open_message(write(half, "half")), "its metadata has no config.json"));
  half = whole;
  half.erase("tokenizer.json");
  const auto mute = open_checkpoint(write(half, "mute"));
  CHECK(
      contains(message_of([&] { (void)mute->tokenizer(); }), "its metadata has no tokenizer.json"));
  // The same file as a part of a Hugging Face folder, given by its own name.
  write_file(dir / "config.json", tiny_config().dump());
  CHECK(open_checkpoint(write({}, "model.safetensors"))->container() == "safetensors");
}

TEST_CASE("checkpoint: GGUF under Hugging Face's names, rotary pairs apart again") {
  TempDir dir;
  const auto value = [](const CheckpointReader& c, const std::string& name) {
    std::vector<int> v;
    for (const float x : c.get(name).to_vector<float>()) v.push_back(static_cast<int>(x * 64));
    return v;
  };
  write_file(dir / "m.gguf", tiny_gguf().build());
  const auto c = open_checkpoint(dir / "m.gguf");
  CHECK(c->container() == "GGUF v3");
  CHECK(c->names().size() == 11);
  CHECK(c->config().tie_word_embeddings);
  // Rows of two heads of two: 29 is the first value of attn_q; a head of two has one pair, so
  // nothing moves.
  CHECK(value(*c, "model.layers.0.self_attn.q_proj.weight").front() == 29);
  CHECK(value(*c, "model.layers.0.mlp.down_proj.weight").size() == 32);
  CHECK(c->meta("model.layers.0.mlp.down_proj.weight").shape == Shape{4, 8});
  CHECK(c->get("model.norm.weight", {4}).dtype() == DType::F32);
  CHECK(c->unused({}).size() == 11);
  CHECK(open_checkpoint(dir.path())->container() == "GGUF v3");  // a folder that holds one
  write_file(dir / "n.gguf", tiny_gguf().build());
  CHECK(contains(open_message(dir.path()), "holds 2 GGUF files"));
}

TEST_CASE("checkpoint: the row order of q and k, for each architecture") {
  TempDir dir;
  for (const char* arch : {"llama", "qwen2"}) {
    // One row per number: 2 heads of 8 for q, 1 for k.
    std::vector<float> rows(16);
    for (size_t i = 0; i < 16; ++i) rows[i] = static_cast<float>(i);
    const std::string p = std::string(arch) + ".";
    GgufBuilder b;
    b.text("general.architecture", arch).u32(p + "block_count", 1).u32(p + "context_length", 8);
    b.u32(p + "embedding_length", 16)
        .u32(p + "feed_forward_length", 8)
        .u32(p + "attention.head_count", 2);
    b.u32(p + "attention.head_count_kv", 1);
    b.f32_tensor("token_embd.weight", {16, 1}, rows)
        .f32_tensor("blk.0.attn_q.weight", {1, 16}, rows);
    b.f32_tensor("blk.0.attn_q.bias", {16}, rows).f32_tensor("blk.0.attn_v.weight", {1, 16}, rows);
    rows.resize(8);
    b.f32_tensor("blk.0.attn_k.weight", {1, 8}, rows);
    write_file(dir / "m.gguf", b.build());
    const auto c = open_checkpoint(dir / "m.gguf");
    const bool moved = std::string_view(arch) == "llama";
    const std::vector<float> head = moved ? std::vector<float>{0, 2, 4, 6, 1, 3, 5, 7} : rows;
    std::vector<float> two = head;
    for (const float x : head) two.push_back(x + 8);
    const std::string a = "model.layers.0.self_attn.";
    CHECK(c->get(a + "q_proj.weight").to_vector<float>() == two);
    CHECK(c->get(a + "q_proj.bias").to_vector<float>() == two);
    CHECK(c->get(a + "k_proj.weight").to_vector<float>() == head);
    CHECK(c->get(a + "v_proj.weight").to_vector<float>()[1] == 1.0f);
  }
}

TEST_CASE("checkpoint: GGUF tensor names") {
  using detail::hf_tensor_name;
  CHECK(hf_tensor_name("token_embd.weight") == "model.embed_tokens.weight");
  CHECK(hf_tensor_name("output.weight") == "lm_head.weight");
  CHECK(hf_tensor_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight");
  CHECK(hf_tensor_name("blk.3.attn_q_norm.weight") == "model.layers.3.self_attn.q_norm.weight");
  CHECK(hf_tensor_name("blk.3.attn_q.bias") == "model.layers.3.self_attn.q_proj.bias");
  for (const char* other :
       {"blk.", "blk.x.attn_q.weight", "blk.1", "blk.1.", "blk.1.attn_q.scale",
        "blk.-1.attn_q.weight", "blk.99999999999.attn_q.weight", "v.patch.weight"}) {
    CHECK(hf_tensor_name(other) == other);
  }
}

TEST_CASE("checkpoint: a GGUF's tokenizer, and as files of an output folder") {
  TempDir dir;
  write_file(dir / "m.gguf", tiny_gguf().build());
  const auto c = open_checkpoint(dir / "m.gguf");
  const Tokenizer t = c->tokenizer();
  CHECK(t.vocab_size() == 6);
  CHECK(t.bos_id() == 1);
  const auto side = c->side_files();
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"})
    CHECK(side.contains(name));
  fs::create_directory(dir / "out");
  for (const auto& [name, content] : side) write_file(dir / "out" / name, content);
  write_file(dir / "out/config.json", c->config().to_hf_json().dump());
  CHECK(Tokenizer::from_folder(dir / "out").encode("a a") == t.encode("a a"));
  GgufBuilder none = tiny_gguf();
  write_file(dir / "bad.gguf", none.u32("tokenizer.ggml.add_bos_token", 1).build());
  CHECK(contains(message_of([&] { (void)open_checkpoint(dir / "bad.gguf")->tokenizer(); }),
                 "a truth value is expected"));
}

TEST_CASE("checkpoint: reference folders of four families") {
  for (const auto& [name, bias, norm] :
       std::vector<std::tuple<const char*, bool, bool>>{{"llama3-sharded", false, false},
                                                        {"mistral", false, false},
                                                        {"qwen2", true, false},
                                                        {"qwen3", false, true}}) {
    CAPTURE(name);
    const auto c = open_checkpoint(source_path("tests/golden") / name);
    const ModelConfig& m = c->config();
    CHECK(m.attention_bias == bias);
    CHECK(m.qk_norm == norm);
    CHECK(c->has("lm_head.weight") != m.tie_word_embeddings);
    CHECK(c->has("model.layers.1.self_attn.k_proj.bias") == bias);
    CHECK(c->has("model.layers.1.self_attn.q_norm.weight") == norm);
    CHECK_NOTHROW(
        (void)c->get("model.layers.0.self_attn.q_proj.weight", {m.q_size(), m.hidden_size}));
    CHECK_NOTHROW(
        (void)c->get("model.layers.1.self_attn.v_proj.weight", {m.kv_size(), m.hidden_size}));
    CHECK_NOTHROW((void)c->get("model.embed_tokens.weight", {m.vocab_size, m.hidden_size}));
  }
}

TEST_CASE("checkpoint: stories260K") {
  const auto path = shared_path("data/model-stories260k/stories260K.gguf");
  if (!path) {
    MESSAGE("skipped: no shared/data/model-stories260k");
    return;
  }
  const auto c = open_checkpoint(*path);
  CHECK(c->config().tie_word_embeddings);  // its output.weight equals the embedding
  CHECK_FALSE(c->has("lm_head.weight"));
  CHECK(c->config().bos_token_id == 1);
  CHECK(c->names().size() == 47);
  const Tokenizer t = c->tokenizer();
  CHECK(t.vocab_size() == 512);
  CHECK(t.decode(t.encode("Once upon a time")) == "Once upon a time");
  CHECK(sha256_file(*path) == "270cba1bd5109f42d03350f60406024560464db173c0e387d91f0426d3bd256d");
}

TEST_CASE("checkpoint: SmolLM2 as GGUF and as its Hugging Face twin") {
  const auto gguf = smollm2_gguf();
  if (!gguf) {
    MESSAGE("skipped: no SmolLM2 (make smollm2)");
    return;
  }
  const auto c = open_checkpoint(*gguf);
  const ModelConfig& m = c->config();
  CHECK(m.rope_theta == 100000.0);
  CHECK(m.tie_word_embeddings);
  CHECK(c->names().size() == 272);
  CHECK(c->meta("model.embed_tokens.weight").dtype == "Q8_0");
  const Tensor e = c->get("model.embed_tokens.weight", {49152, 576});
  CHECK(e.dtype() == DType::F32);
  const char* twin = std::getenv("OMQ_SMOLLM2_HF");
  if (twin == nullptr) {
    MESSAGE("skipped: no Hugging Face twin of SmolLM2 (OMQ_SMOLLM2_HF)");
    return;
  }
  const auto h = open_checkpoint(twin);
  CHECK(h->names() == c->names());
  CHECK(h->config().rms_norm_eps == doctest::Approx(m.rms_norm_eps));
  for (const std::string& name : c->names()) {
    const std::vector<float> a = c->get(name).to_vector<float>(),
                             b = h->get(name).to_vector<float>();
    REQUIRE(a.size() == b.size());
    float worst = 0, largest = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      worst = std::max(worst, std::abs(a[i] - b[i]));
      largest = std::max(largest, std::abs(b[i]));
    }
    CAPTURE(name);
    CHECK(worst <= 2e-7f * largest);
  }
}

}  // namespace omq
