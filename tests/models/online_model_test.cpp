// Stored models with online transforms: they are read back to the last bit, counted in the sizes,
// run token by token as a whole, and refused by name where words and tensors do not fit.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>

#include "autograd/ops.h"
#include "models/json_file.h"
#include "models/model.h"
#include "models/packed_model.h"
#include "quant/calibrate.h"
#include "quant/rotation.h"
#include "tests/models/files.h"
#include "tests/support/close.h"
#include "tests/support/random_model.h"

namespace omq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr quant::RotationOptions kOnline{
    .residual = false, .values = false, .heads = true, .down = true, .query_key = true};
const OnlineSpecs kSpecs{{"mlp.down_proj", {8, 9}},
                         {"self_attn.k", {2, 4}},
                         {"self_attn.o_proj", {4, 0}},
                         {"self_attn.q", {2, 4}}};

// The random model with transforms in its blocks, its matrices at 4 bits; returns the model as it
// was before it was written.
Model write_online_model(const fs::path& source, const fs::path& out) {
  write_random_model(source, {.layers = 2, .seed = 5});
  const auto reader = open_checkpoint(source);
  Model model = Model::load(*reader, 0, LoadAs::F32);
  const quant::Rotation q = quant::residual_rotation(kRandomHidden, 1);
  const ActivationSpec bits{.activation = 4, .q = 4, .k = 4, .v = 4};
  for (size_t i = 0; i < model.blocks.size(); ++i) {
    quant::rotate_block(*model.blocks[i], static_cast<int>(i), q, kOnline);
    nn::quantize_activations(*model.blocks[i], bits.quant());
    for (auto& [name, linear] : model.blocks[i]->linears())
      linear->weight = quant::pack_nearest(linear->dense(), {.wbits = 4});
  }
  const PackedConfig config{.method = "test",
                            .weight = {4, 0, false},
                            .exceptions = {},
                            .activations = bits,
                            .online = online_specs(*model.blocks[0])};
  PackedModelWriter writer(*reader, config, out, false);
  writer.add("model.embed_tokens", model.ends.embed_tokens.table);
  writer.add_tensor("model.norm.weight", model.ends.norm.weight);
  for (size_t i = 0; i < model.blocks.size(); ++i)
    writer.store(static_cast<int>(i), *model.blocks[i]);
  writer.close();
  writer.commit();
  return model;
}

Tensor some_ids(int64_t count) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<int32_t>((i * i * 31 + i * 7 + 3) % kRandomVocab));
  return Tensor::from<int32_t>(ids, {1, count});
}

}  // namespace

TEST_CASE("online model: what is written is read back to the last bit") {
  const NoGrad off;
  TempDir dir;
  const Model model = write_online_model(dir / "source", dir / "m");
  const auto reader = open_checkpoint(dir / "m");
  const auto config = PackedConfig::of(reader->config());
  REQUIRE(config.has_value());
  CHECK(config->online == kSpecs);
  CHECK(config->to_json()["omq_format"] == 4);
  CHECK(config->to_json() == reader->config().quantization);
  const Model loaded = Model::load(*reader);
  const Tensor ids = some_ids(40), want = model.logits(model.forward(ids));
  CHECK(bit_equal(loaded.logits(loaded.forward(ids)), want));
  for (const auto& block : loaded.blocks) CHECK(online_specs(*block) == kSpecs);
  // Without any of them the model says something else.
  for (const char* name : {"down", "o", "q"}) {
    CAPTURE(name);
    const Model less = Model::load(*reader);
    for (const auto& block : less.blocks) {
      if (name[0] == 'd') block->mlp.down_proj.online = {};
      if (name[0] == 'o') block->self_attn.o_proj.online = {};
      if (name[0] == 'q') block->taps().q_online = {};
    }
    CHECK_FALSE(close(less.logits(less.forward(ids)), want, 1e-3));
  }
  // The factors are counted: 2 blocks of 8² + 9², 4², and twice 2² + 4² numbers of 4 bytes.
  Model bare = Model::load(*reader);
  for (const auto& block : bare.blocks) {
    block->mlp.down_proj.online = block->self_attn.o_proj.online = {};
    block->taps().q_online = block->taps().k_online = {};
  }
  CHECK(model_size(loaded).bytes == model_size(bare).bytes + 2 * 4 * (64 + 81 + 16 + 2 * 20));
}

TEST_CASE("online model: token by token over a cache of codes is the whole at once") {
  const NoGrad off;
  TempDir dir;
  write_online_model(dir / "source", dir / "m");
  const Model model = Model::load(*open_checkpoint(dir / "m"));
  const Tensor ids = some_ids(24), whole = model.forward(ids);
  auto caches = model.new_caches(1, 24);
  std::vector<double> errors;
  for (int64_t t = 0; t < 24; ++t) {
    const Tensor y = model.forward(contiguous(slice(ids, 1, t, t + 1)), t, &caches);
    const std::vector<double> a = values(y), b = values(slice(whole, 1, t, t + 1));
    double error = 0, power = 0;
    for (size_t i = 0; i < a.size(); ++i)
      error += (a[i] - b[i]) * (a[i] - b[i]), power += b[i] * b[i];
    errors.push_back(std::sqrt(error / power));
  }
  // A code that falls to the other side of a tie is felt by what follows; most tokens have none.
  std::sort(errors.begin(), errors.end());
  CHECK(errors[12] < 2e-6);
  CHECK(errors.back() < 0.3);
}

TEST_CASE("online model: words that are not known, or do not fit, are refused by name") {
  TempDir dir;
  write_online_model(dir / "source", dir / "m");
  const json good = parse_json(read_file(dir / "m/config.json"), "config.json");
  const char* down = R"({"online_transforms": {"mlp.down_proj": %}})";
  const auto with = [&](const char* text) {
    std::string s = down;
    return s.replace(s.find('%'), 1, text);
  };
  // Patches of quantization_config; null removes.
  const std::vector<std::pair<std::string, const char*>> cases = {
      {with(R"({"type": "wavelet"})"),
       "online_transforms: mlp.down_proj: a transform of type \"wavelet\" is not known"},
      {with(R"({"type": null})"), "online_transforms: mlp.down_proj: type is missing"},
      {with("7"), "online_transforms: mlp.down_proj: type is missing"},
      {with(R"({"left": null})"), "mlp.down_proj: left is missing or no whole number"},
      {with(R"({"right": "9"})"), "mlp.down_proj: right is missing or no whole number"},
      {with(R"({"left": -8})"), "mlp.down_proj: left = -8, 0 to 65536 wanted"},
      {with(R"({"left": 18446744073709551615})"), "0 to 65536 wanted"},
      {with(R"({"left": 0, "right": 0})"), "mlp.down_proj: both factors are 0"},
      {with(R"({"left": 9, "right": 8})"), "model.layers.0.mlp.down_proj.online.left"},
      {with(R"({"left": 0, "right": 10})"),
       "mlp.down_proj: factors of 0 and 10 (0: none) do not fit rows of 72"},
      {R"({"online_transforms": {"mlp.side_proj": {"type": "kronecker", "left": 2, "right": 2}}})",
       "a block has nothing that is called \"mlp.side_proj\""},
      {R"({"online_transforms": {"mlp.up_proj": {"type": "kronecker", "left": 4, "right": 8}}})",
       "model.layers.0.mlp.up_proj.online.left"},
      {R"({"online_transforms": []})", "online_transforms is not an object"},
      {R"({"online_transforms": null})", "online_transforms is missing in omq_format 4"},
      {R"({"omq_format": 3})", "online_transforms does not belong in omq_format 3"}};
  for (const auto& [patch, message] : cases) {
    CAPTURE(patch);
    json config = good;
    config["quantization_config"].merge_patch(json::parse(patch));
    write_file(dir / "m/config.json", config.dump());
    const std::string said = message_of([&] {
      const auto reader = open_checkpoint(dir / "m");
      Model::load(*reader);
    });
    CAPTURE(said);
    CHECK(contains(said, message));
  }
}

TEST_CASE("online model: factors that are missing, of another shape or no numbers") {
  TempDir dir;
  write_online_model(dir / "source", dir / "m");
  const std::string name = "model.layers.1.mlp.down_proj.online.right";
  const SafetensorsFile good(dir / "m/model.safetensors");
  const auto message = [&](const std::function<bool(Tensor&)>& edit) {
    fs::create_directories(dir / "bad");
    fs::copy_file(dir / "m/config.json", dir / "bad/config.json",
                  fs::copy_options::overwrite_existing);
    SafetensorsWriter bad(dir / "bad/model.safetensors");
    for (const SafetensorsEntry& e : good.entries()) {
      Tensor t = converted(good.get(e.name), good.get(e.name).dtype());
      if (e.name != name || edit(t)) bad.add(e.name, t);
    }
    bad.finish();
    return message_of([&] {
      const auto reader = open_checkpoint(dir / "bad");
      Model::load(*reader);
    });
  };
  CHECK(message([](Tensor&) { return true; }).empty());
  CHECK(contains(message([](Tensor&) { return false; }), name));
  CHECK(contains(message([](Tensor& t) {
                   t = contiguous(slice(t, 1, 0, 8));
                   return true;
                 }),
                 name));
  CHECK(contains(message([](Tensor& t) {
                   t.data<float>()[7] = std::numeric_limits<float>::quiet_NaN();
                   return true;
                 }),
                 name));
}

}  // namespace omq
