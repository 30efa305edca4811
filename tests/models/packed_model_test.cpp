// The native output folder: what the writer stores, the loader gives back to the last bit, at every
// width, with tables packed or not; and what is refused, of configurations and of tensors.
#include "models/packed_model.h"

#include <doctest/doctest.h>

#include <limits>

#include "autograd/ops.h"
#include "models/json_file.h"
#include "models/model.h"
#include "quant/calibrate.h"
#include "tensor/numeric.h"
#include "tests/models/files.h"
#include "tests/support/close.h"
#include "tests/support/random_model.h"

namespace omq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct Packing {
  MatrixSpec weight;
  std::optional<MatrixSpec> table;  // of embedding and head; none: f16
};

quant::QuantSpec quant_spec(const MatrixSpec& s) {
  return {.wbits = s.bits, .group_size = s.group_size, .symmetric = s.symmetric};
}

nn::Weight packed_table(const Tensor& w, const Packing& p) {
  if (!p.table) return to(w, DType::F16);
  return quant::pack_nearest(to(w, DType::F32), quant_spec(*p.table));
}

// Packs `model` (loaded as F32) in place.
void pack_model(Model& model, const Packing& p) {
  for (auto& block : model.blocks)
    for (auto& [name, linear] : block->linears())
      linear->weight = quant::pack_nearest(linear->dense(), quant_spec(p.weight));
  const bool tied = model.config().tie_word_embeddings;
  model.ends.embed_tokens.table = packed_table(std::get<Tensor>(model.ends.embed_tokens.table), p);
  model.ends.lm_head.weight =
      tied ? model.ends.embed_tokens.table : packed_table(model.ends.lm_head.dense(), p);
}

PackedConfig packed_config(const Packing& p, bool tied) {
  PackedConfig c{.method = "test", .weight = p.weight, .exceptions = {}};
  if (p.table) c.exceptions["model.embed_tokens"] = *p.table;
  if (p.table && !tied) c.exceptions["lm_head"] = *p.table;
  return c;
}

void write_packed(const CheckpointReader& source, Model& model, const PackedConfig& config,
                  const fs::path& out, bool force = false) {
  PackedModelWriter writer(source, config, out, force);
  writer.add("model.embed_tokens", model.ends.embed_tokens.table);
  if (!model.config().tie_word_embeddings) writer.add("lm_head", model.ends.lm_head.weight);
  writer.add_tensor("model.norm.weight", model.ends.norm.weight);
  for (size_t i = 0; i < model.blocks.size(); ++i)
    writer.store(static_cast<int>(i), *model.blocks[i]);
  writer.close();
  writer.commit();
}

Tensor some_logits(const Model& model) {
  NoGrad off;
  const int64_t vocab = model.config().vocab_size;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < 7; ++i) ids.push_back(static_cast<int32_t>((i * 37 + 5) % vocab));
  return model.logits(model.forward(Tensor::from<int32_t>(ids, {1, 7})));
}

void check_same_weight(const nn::Weight& got, const nn::Weight& want) {
  REQUIRE(got.index() == want.index());
  if (const auto* dense = std::get_if<Tensor>(&want)) {
    CHECK(bit_equal(std::get<Tensor>(got), *dense));
    return;
  }
  using Packed = std::shared_ptr<nn::PackedWeight>;
  CHECK(bit_equal(std::get<Packed>(got)->dequantize(), std::get<Packed>(want)->dequantize()));
  CHECK(std::get<Packed>(got)->nbytes() == std::get<Packed>(want)->nbytes());
}

void check_same_model(Model& got, Model& want) {
  REQUIRE(got.blocks.size() == want.blocks.size());
  for (size_t i = 0; i < got.blocks.size(); ++i) {
    const auto a = got.blocks[i]->linears(), b = want.blocks[i]->linears();
    for (size_t j = 0; j < a.size(); ++j) {
      CAPTURE(a[j].name);
      CHECK(a[j].linear->is_packed());
      check_same_weight(a[j].linear->weight, b[j].linear->weight);
      REQUIRE(a[j].linear->bias.defined() == b[j].linear->bias.defined());
      if (b[j].linear->bias.defined()) CHECK(bit_equal(a[j].linear->bias, b[j].linear->bias));
    }
    CHECK(bit_equal(got.blocks[i]->input_layernorm.weight, want.blocks[i]->input_layernorm.weight));
  }
  check_same_weight(got.ends.embed_tokens.table, want.ends.embed_tokens.table);
  check_same_weight(got.ends.lm_head.weight, want.ends.lm_head.weight);
  CHECK(bit_equal(some_logits(got), some_logits(want)));
}

// Bytes of all matrices as the file holds them.
uint64_t matrix_bytes(const CheckpointReader& reader) {
  uint64_t sum = 0;
  for (const std::string& name : reader.names())
    if (!name.ends_with("norm.weight") && !name.ends_with(".bias")) sum += reader.meta(name).bytes;
  return sum;
}

// Source → packed folder → model, and the same from model.safetensors alone.
void check_round_trip(const RandomModel& source, const Packing& packing) {
  TempDir dir;
  write_random_model(dir / "source", source);
  const auto reader = open_checkpoint(dir / "source");
  Model model = Model::load(*reader, 0, LoadAs::F32);
  pack_model(model, packing);
  const PackedConfig config = packed_config(packing, source.tied);
  write_packed(*reader, model, config, dir / "packed");
  fs::copy(dir / "packed/model.safetensors", dir / "alone.safetensors");

  for (const std::string name : {"packed", "alone.safetensors"}) {
    CAPTURE(name);
    const auto written = open_checkpoint(dir / name);
    const auto found = PackedConfig::of(written->config());
    REQUIRE(found.has_value());
    CHECK(found->weight == config.weight);
    CHECK(found->exceptions == config.exceptions);
    CHECK(found->method == "test");
    Model loaded = Model::load(*written);
    check_same_model(loaded, model);
    const ModelSize size = model_size(loaded);
    CHECK(size.bytes == matrix_bytes(*written));
    CHECK(written->tokenizer().encode("naïve\n") == reader->tokenizer().encode("naïve\n"));
    CHECK(written->config().eos_token_ids == reader->config().eos_token_ids);
  }
}

}  // namespace

TEST_CASE("packed model: what is written is read back to the last bit, at every width") {
  for (const int bits : {2, 3, 4, 5, 8})
    for (const int64_t group : {0, 32})
      for (const bool symmetric : {false, true}) {
        CAPTURE(bits);
        CAPTURE(group);
        CAPTURE(symmetric);
        const MatrixSpec spec{bits, group, symmetric};
        check_round_trip({.tied = bits % 2 == 0, .layers = 1}, {spec, {}});
      }
}

TEST_CASE("packed model: tables packed or f16, tied or not, biases, sources of 16 bits") {
  const MatrixSpec w3{3, 32, false}, w8{8, 128, false}, w4{4, 32, true};
  for (const bool tied : {true, false}) {
    CAPTURE(tied);
    check_round_trip({.tied = tied, .dtype = DType::BF16, .layers = 1}, {w3, w8});
    check_round_trip({.tied = tied, .dtype = DType::F16, .layers = 1}, {w3, w4});
    check_round_trip({.type = "qwen2", .tied = tied}, {w3, {}});
  }
}

TEST_CASE("packed model: the bits per weight that are said are those of the file") {
  TempDir dir;
  write_random_model(dir / "source", {.layers = 1});
  const auto reader = open_checkpoint(dir / "source");
  Model model = Model::load(*reader, 0, LoadAs::F32);
  pack_model(model, {{4, 32, false}, {}});
  const ModelSize size = model_size(model);
  // 32 columns and the last 8 of down_proj's 72 are whole vectors of codes: 4 bits, and 3 bytes of
  // scale and zero for each row and group.
  const int64_t weights = 32 * 32 * 2 + 16 * 32 * 2 + 72 * 32 * 3;
  const int64_t groups = 32 + 32 + 16 + 16 + 72 + 72 + 32 * 3;
  const int64_t padding = 2 * 8 * (32 / 2 + 3);  // gate and up: 72 rows in panels of 16
  CHECK(size.block_weights == weights);
  CHECK(size.block_bytes == static_cast<size_t>(weights / 2 + 3 * groups + padding));
  CHECK(size.weights == weights + kRandomVocab * kRandomHidden);
  CHECK(size.bytes == size.block_bytes + 2 * static_cast<size_t>(kRandomVocab * kRandomHidden));
  CHECK(size.token_bytes == size.bytes);
}

TEST_CASE("packed model: a GGUF becomes a whole folder") {
  TempDir dir;
  write_file(dir / "m.gguf", tiny_gguf("llama", false).build());
  const auto reader = open_checkpoint(dir / "m.gguf");
  Model model = Model::load(*reader, 0, LoadAs::F32);
  const Packing packing{{8, 0, false}, {}};
  pack_model(model, packing);
  write_packed(*reader, model, packed_config(packing, false), dir / "packed");
  for (const std::string name : {"config.json", "model.safetensors", "tokenizer.json",
                                 "tokenizer_config.json", "generation_config.json"})
    CHECK(fs::exists(dir / "packed" / name));
  const auto written = open_checkpoint(dir / "packed");
  Model loaded = Model::load(*written);
  check_same_model(loaded, model);
  CHECK(written->tokenizer().encode("a a") == reader->tokenizer().encode("a a"));
  CHECK(written->config().rope_theta == 5e5);
}

TEST_CASE("packed model: nothing appears before commit, nothing is replaced unasked") {
  TempDir dir;
  write_random_model(dir / "source", {.layers = 1});
  const auto reader = open_checkpoint(dir / "source");
  Model model = Model::load(*reader, 0, LoadAs::F32);
  const Packing packing{{4, 0, false}, {}};
  pack_model(model, packing);
  const PackedConfig config = packed_config(packing, true);
  {
    PackedModelWriter writer(*reader, config, dir / "out", false);
    writer.store(0, *model.blocks[0]);
    CHECK(contains(message_of([&] { writer.store(0, *model.blocks[0]); }), "is given twice"));
    CHECK_FALSE(fs::exists(dir / "out"));
    CHECK(dir.entries() == 2);  // source and the partial folder
  }
  CHECK(dir.entries() == 1);
  write_packed(*reader, model, config, dir / "out");
  CHECK(contains(message_of([&] { write_packed(*reader, model, config, dir / "out"); }),
                 "it exists; choose another name or pass --force"));
  const std::string before = read_file(dir / "out/model.safetensors");
  write_packed(*reader, model, config, dir / "out", true);
  CHECK(read_file(dir / "out/model.safetensors") == before);  // the same input, the same bytes
  CHECK(dir.entries() == 2);
}

namespace {

json good_config() {
  return PackedConfig{
      .method = "rtn", .weight = {3, 64, true}, .exceptions = {{"lm_head", {8, 128, false}}}}
      .to_json();
}

std::string refused(const json& quantization, const std::string& source = "") {
  ModelConfig c;
  c.quantization = quantization;
  c.source = source;
  return message_of([&] { (void)PackedConfig::of(c); });
}

}  // namespace

TEST_CASE("packed config: printing and reading") {
  ModelConfig c;
  CHECK_FALSE(PackedConfig::of(c).has_value());
  c.quantization = good_config();
  const auto p = PackedConfig::of(c);
  REQUIRE(p.has_value());
  CHECK(p->spec_of("model.layers.0.mlp.up_proj") == MatrixSpec{3, 64, true});
  CHECK(p->spec_of("lm_head") == MatrixSpec{8, 128, false});
  CHECK(p->method == "rtn");
  CHECK(p->to_json() == c.quantization);
  CHECK(p->activations == ActivationSpec{});
  for (const char* key :
       {"activation_bits", "q_bits", "k_bits", "v_bits", "p_bits", "activation_include_zero"})
    c.quantization.erase(key);  // as a file from before there were any
  CHECK(PackedConfig::of(c)->activations == ActivationSpec{});
  PackedConfig bits = *p;
  bits.activations = {.activation = 4, .q = 5, .k = 6, .v = 7, .p = 8, .include_zero = false};
  c.quantization = bits.to_json();
  CHECK(PackedConfig::of(c)->activations == bits.activations);
  CHECK(cache_quant(c).k == RowQuant{.bits = 6, .include_zero = false});
  CHECK(bits.activations.quant().linear == RowQuant{.bits = 4, .include_zero = false});
  CHECK_FALSE(ActivationSpec{}.quant().linear.has_value());
  // A share of the ranges: nothing that a reader of version 1 may overlook.
  CHECK(c.quantization["omq_format"] == 3);
  bits.activations.activation_clip = 0.9;
  bits.activations.qkv_clip = 0.95;
  c.quantization = bits.to_json();
  CHECK(c.quantization["omq_format"] == 4);
  CHECK(PackedConfig::of(c)->activations == bits.activations);
  CHECK(cache_quant(c).v == RowQuant{.bits = 7, .include_zero = false, .clip = 0.95});
  CHECK(bits.activations.quant().linear == RowQuant{.bits = 4, .include_zero = false, .clip = 0.9});
  CHECK(bits.activations.quant().p == RowQuant{.bits = 8, .include_zero = false});
  // Five bits are stored as eight, with the zero points written out.
  CHECK(MatrixSpec{5, 32, true}.stored() == GroupSpec{.bits = 8, .group_size = 32});
  CHECK(MatrixSpec{3, 32, true}.stored() ==
        GroupSpec{.bits = 3, .group_size = 32, .symmetric = true});
}

TEST_CASE("packed config: what is not ours, or not whole, is refused by name") {
  struct Case {
    const char* patch;  // merged into a good configuration; null removes
    const char* message;
  };
  const Case cases[] = {
      {R"({"quant_method": "gptq"})", "quant_method \"gptq\" is not supported"},
      {R"({"quant_method": null})", "quant_method is missing"},
      {R"({"quant_method": 4})", "quant_method is missing"},
      {R"({"omq_format": 1})", "omq_format 1 is not supported, 3 and 4 are"},
      {R"({"omq_format": "1"})", "omq_format \"1\" is not supported"},
      {R"({"omq_format": null})", "omq_format (missing) is not supported"},
      {R"({"layout": "row"})", "layout \"row\" is not supported"},
      {R"({"layout": null})", "layout (missing) is not supported"},
      {R"({"bits": null})", "quantization_config: bits is missing or of the wrong type"},
      {R"({"bits": "3"})", "quantization_config: bits is missing or of the wrong type"},
      {R"({"bits": 3.5})", "bits is missing or of the wrong type"},
      {R"({"bits": 1})", "bits = 1, 2 to 8 wanted"},
      {R"({"bits": 9})", "bits = 9, 2 to 8 wanted"},
      {R"({"bits": -4294967292})", "bits = -4294967292, 2 to 8 wanted"},
      {R"({"bits": 4294967300})", "bits = 4294967300, 2 to 8 wanted"},
      {R"({"bits": 18446744073709551615})", "2 to 8 wanted"},
      {R"({"group_size": null})", "group_size is missing or of the wrong type"},
      {R"({"group_size": -1})", "group_size = -1"},
      {R"({"group_size": 4611686018427387904})", "group_size = 4611686018427387904"},
      {R"({"group_size": 18446744073709551615})", "group_size = "},
      {R"({"symmetric": null})", "symmetric is missing or of the wrong type"},
      {R"({"symmetric": 1})", "symmetric is missing or of the wrong type"},
      {R"({"activation_bits": 12})", "activation_bits = 12, 2 to 8 or 16 (none) wanted"},
      {R"({"k_bits": 1})", "k_bits = 1, 2 to 8 or 16 (none) wanted"},
      {R"({"v_bits": 4294967300})", "v_bits = 4294967300, 2 to 8 or 16 (none) wanted"},
      {R"({"p_bits": "4"})", "p_bits is \"4\", a whole number wanted"},
      {R"({"q_bits": 4.5})", "q_bits is 4.5, a whole number wanted"},
      {R"({"activation_include_zero": 1})", "activation_include_zero is 1, true or false wanted"},
      {R"({"activation_clip": 0})", "activation_clip = 0, above 0 and at most 1 wanted"},
      {R"({"qkv_clip": 1.5})", "qkv_clip = 1.5, above 0 and at most 1 wanted"},
      {R"({"qkv_clip": "1"})", "qkv_clip is \"1\", a number wanted"},
      {R"({"exceptions": []})", "exceptions is not an object"},
      {R"({"exceptions": {"lm_head": 4}})", "exceptions: lm_head: not an object"},
      {R"({"exceptions": {"lm_head": {"bits": 77}}})", "exceptions: lm_head: bits = 77"},
  };
  for (const Case& c : cases) {
    CAPTURE(std::string(c.patch));
    json j = good_config();
    j.merge_patch(json::parse(c.patch));
    const std::string message = refused(j);
    CAPTURE(message);
    CHECK(contains(message, c.message));
    CHECK(message.starts_with("quantization_config"));
  }
  for (const std::string text : {"[]", "3", "\"awq\"", "{}", "true"})
    CHECK(contains(refused(json::parse(text)), "quant_method is missing"));
  const std::string foreign = refused({{"quant_method", "gptq"}}, "there/config.json");
  CHECK(
      foreign.starts_with("there/config.json: quantization_config: quant_method \"gptq\" is not"));
}

namespace {

// A packed folder of one layer whose tensors and configuration can be spoilt before it is opened.
struct Spoilt {
  TempDir dir;
  std::function<bool(const std::string& name, Tensor& t)> tensor = [](auto&, auto&) {
    return true;
  };
  std::function<void(json& config)> config = [](json&) {};

  std::string message() {
    write_random_model(dir / "source", {.layers = 1});
    const auto reader = open_checkpoint(dir / "source");
    Model model = Model::load(*reader, 0, LoadAs::F32);
    const Packing packing{{4, 32, false}, MatrixSpec{8, 0, false}};
    pack_model(model, packing);
    write_packed(*reader, model, packed_config(packing, true), dir / "good");
    fs::create_directories(dir / "bad");
    json text = parse_json(read_file(dir / "good/config.json"), "config.json");
    config(text);
    write_file(dir / "bad/config.json", text.dump());
    const SafetensorsFile good(dir / "good/model.safetensors");
    SafetensorsWriter bad(dir / "bad/model.safetensors");
    for (const SafetensorsEntry& e : good.entries()) {
      Tensor t = converted(good.get(e.name), good.get(e.name).dtype());
      if (tensor(e.name, t)) bad.add(e.name, t);
    }
    bad.finish();
    return message_of([&] { some_logits(Model::load(*open_checkpoint(dir / "bad"))); });
  }
};

}  // namespace

TEST_CASE("packed model: tensors that do not fit their configuration") {
  const std::string up = "model.layers.0.mlp.up_proj.packed";
  Spoilt untouched;
  CHECK(untouched.message() == "");

  Spoilt cut;
  cut.tensor = [&](const std::string& name, Tensor& t) {
    if (name == up) t = contiguous(slice(t, 1, 0, t.dim(1) - 1));
    return true;
  };
  const std::string message = cut.message();
  CAPTURE(message);
  CHECK(contains(message, "reading " + up + " of "));
  CHECK(contains(message, "packed weight [72, 32] at 4 bits, groups of 32"));

  Spoilt floats;
  floats.tensor = [&](const std::string& name, Tensor& t) {
    if (name == up) t = Tensor::zeros({t.numel() / 4}, DType::F32);
    return true;
  };
  CHECK(contains(floats.message(), "bytes of U8 wanted"));

  Spoilt missing;
  missing.tensor = [&](const std::string& name, Tensor&) { return name != up; };
  CHECK(contains(missing.message(), "no tensor model.layers.0.mlp.up_proj.weight"));

  Spoilt other_bits;
  other_bits.config = [](json& c) { c["quantization_config"]["bits"] = 3; };
  CHECK(contains(other_bits.message(), "at 3 bits"));

  Spoilt other_groups;
  other_groups.config = [](json& c) { c["quantization_config"]["group_size"] = 16; };
  CHECK(contains(other_groups.message(), "groups of 16"));

  Spoilt no_config;  // a packed file whose configuration lost the word about it
  no_config.config = [](json& c) { c.erase("quantization_config"); };
  CHECK(contains(no_config.message(), "no tensor model.embed_tokens.weight"));

  Spoilt wider;
  wider.config = [](json& c) { c["hidden_size"] = 64; };
  CHECK(contains(wider.message(), "model.embed_tokens.packed"));
}

TEST_CASE("packed model: grids that cannot be are found when the file is opened") {
  for (const bool scale : {true, false}) {
    CAPTURE(scale);
    Spoilt grid;
    grid.tensor = [&](const std::string& name, Tensor& t) {
      if (name != "model.layers.0.mlp.up_proj.packed") return true;
      // Second panel, row 3: 16 rows × 32 columns of 4 bits, then scales, then zeros.
      uint8_t* at = t.data<uint8_t>() + t.dim(1) + 256;
      if (scale)
        at[2 * 3 + 1] = 0x7e;  // NaN
      else
        at[32 + 3] = 16;
      return true;
    };
    const std::string message = grid.message();
    CAPTURE(message);
    CHECK(contains(message, "model.layers.0.mlp.up_proj.packed"));
    CHECK(contains(message, scale ? "the scale of row 19, group 0 is not a finite number"
                                  : "the zero point of row 19, group 0 is 16, which is no code"));
  }
}

}  // namespace omq
