// A stored model with quantised activations: it is read back as one, multiplies in integers, keeps
// its cache as codes, and gives what the simulation gives.
//
// Tokens are compared one by one: rounding puts now and then a value on the other side of a tie,
// and its code, one step off, is then felt by all that follows in that token and by tokens that
// look at it. So nearly all must agree to rounding, and none may be far off.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "models/model.h"
#include "models/packed_model.h"
#include "quant/calibrate.h"
#include "tests/models/files.h"
#include "tests/support/close.h"
#include "tests/support/random_model.h"

namespace omq {
namespace {

constexpr int64_t kTokens = 96;

// The random model, its weights at 4 bits in groups of 32, with the biases that a learned shift
// leaves, written with these activation bits.
void write_integer_model(const std::filesystem::path& folder, const ActivationSpec& activations) {
  TempDir dir;
  write_random_model(dir / "source", {.layers = 2, .seed = 5});
  const auto reader = open_checkpoint(dir / "source");
  Model model = Model::load(*reader, 0, LoadAs::F32);
  const PackedConfig config{
      .method = "test", .weight = {4, 32, false}, .exceptions = {}, .activations = activations};
  PackedModelWriter writer(*reader, config, folder, false);
  writer.add("model.embed_tokens", model.ends.embed_tokens.table);
  writer.add_tensor("model.norm.weight", model.ends.norm.weight);
  Rng rng(8);
  for (size_t i = 0; i < model.blocks.size(); ++i) {
    LlamaBlock& b = *model.blocks[i];
    for (nn::RMSNorm* norm : {&b.input_layernorm, &b.post_attention_layernorm})
      norm->bias = normal_tensor(rng, {kRandomHidden}, DType::F32, 0.2);
    for (auto& [name, linear] : b.linears()) {
      if (name != "mlp.down_proj")
        linear->bias = normal_tensor(rng, {linear->out_features()}, DType::F32, 0.2);
      linear->weight = quant::pack_nearest(linear->dense(), {.wbits = 4, .group_size = 32});
    }
    writer.store(static_cast<int>(i), b);
  }
  writer.close();
  writer.commit();
}

// The model with dense matrices in place of the packed ones: its activations are then simulated.
Model simulated(const CheckpointReader& reader) {
  Model m = Model::load(reader);
  for (auto& block : m.blocks)
    for (auto& [name, linear] : block->linears())
      linear->weight = std::get<std::shared_ptr<nn::PackedWeight>>(linear->weight)->dequantize();
  return m;
}

Tensor some_ids(int64_t batch) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < batch * kTokens; ++i)
    ids.push_back(static_cast<int32_t>((i * i * 31 + i * 7 + 3) % kRandomVocab));
  return Tensor::from<int32_t>(ids, {batch, kTokens});
}

// ‖got − want‖ / ‖want‖ of every token, sorted. [..., D]
std::vector<double> token_errors(const Tensor& got, const Tensor& want) {
  REQUIRE(got.shape() == want.shape());
  const std::vector<double> a = values(got), b = values(want);
  const auto d = static_cast<size_t>(want.shape().back());
  std::vector<double> errors;
  for (size_t t = 0; t < a.size(); t += d) {
    double error = 0, power = 0;
    for (size_t i = t; i < t + d; ++i) error += (a[i] - b[i]) * (a[i] - b[i]), power += b[i] * b[i];
    errors.push_back(std::sqrt(error / power));
  }
  std::sort(errors.begin(), errors.end());
  return errors;
}

// What is lost by the way of multiplying: products of codes are exact; where activations stay
// floats, few rows of them are rounded to 15 bits and many are not.
double rounding(const ActivationSpec& s) {
  return s.activation < 16 && s.include_zero ? 2e-6 : 2e-4;
}

// share: of the tokens in which no code fell to the other side of a tie.
void check_agrees(const Tensor& got, const Tensor& want, double share, double rounding) {
  const std::vector<double> errors = token_errors(got, want);
  const auto at = static_cast<size_t>(share * static_cast<double>(errors.size() - 1));
  CAPTURE(errors[at]);
  CAPTURE(errors.back());
  CHECK(errors[at] < rounding);
  CHECK(errors.back() < 0.3);
}

const std::vector<ActivationSpec>& specs() {
  static const std::vector<ActivationSpec> all = {
      {.activation = 4, .q = 4, .k = 4, .v = 4},
      {.activation = 6, .q = 6, .k = 6, .v = 6},
      {.activation = 8, .q = 8, .k = 8, .v = 8},
      {.activation = 4, .q = 16, .k = 8, .v = 3},
      {.activation = 16, .q = 16, .k = 4, .v = 16},
      {.activation = 8, .q = 8, .k = 8, .v = 8, .p = 8},
      {.activation = 4, .q = 4, .k = 4, .v = 4, .activation_clip = 0.9, .qkv_clip = 0.95},
      {.activation = 4, .q = 4, .k = 4, .v = 4, .p = 16, .include_zero = false}};
  return all;
}

template <class F> void for_each_spec(F&& f) {
  for (const ActivationSpec& s : specs()) {
    CAPTURE(s.activation);
    CAPTURE(s.q);
    CAPTURE(s.k);
    CAPTURE(s.v);
    CAPTURE(s.p);
    CAPTURE(s.include_zero);
    TempDir dir;
    write_integer_model(dir / "m", s);
    f(s, *open_checkpoint(dir / "m"));
  }
}

}  // namespace

TEST_CASE("integer model: a block multiplies codes and gives what is simulated") {
  const NoGrad off;
  for_each_spec([](const ActivationSpec& s, const CheckpointReader& reader) {
    Model model = Model::load(reader);
    const Model twin = simulated(reader);
    Rng rng(3);
    const Tensor x = normal_tensor(rng, {2, kTokens, kRandomHidden}, DType::F32);
    const nn::Positions at = nn::positions(0, kTokens, model_rope(reader, kTokens));
    for (size_t i = 0; i < model.blocks.size(); ++i) {
      LlamaBlock& block = *model.blocks[i];
      CHECK(block.input_layernorm.bias.defined());
      CHECK(block.mlp.up_proj.bias.defined());
      CHECK(block.taps().k == s.quant().k);
      for (const auto& [name, linear] : block.linears()) {
        CHECK(linear->is_packed());
        CHECK(linear->input_quant == s.quant().linear);
      }
      check_agrees(block.forward(x, at), twin.blocks[i]->forward(x, at), 0.95, rounding(s));
      // And not what activations left alone give.
      const auto plain = block.clone();
      nn::quantize_activations(*plain, {});
      CHECK(token_errors(block.forward(x, at), plain->forward(x, at)).back() > 1e-4);
    }
  });
}

TEST_CASE("integer model: token by token over a cache of codes is the whole at once") {
  const NoGrad off;
  for_each_spec([](const ActivationSpec& s, const CheckpointReader& reader) {
    const Model model = Model::load(reader);
    const Tensor ids = some_ids(2), whole = model.forward(ids);
    auto caches = model.new_caches(2, kTokens);
    for (const nn::KVCache& cache : caches) {
      CHECK(cache.quant().k == s.quant().k);
      CHECK(cache.quant().v == s.quant().v);
    }
    int64_t begin = 0;
    std::vector<Tensor> parts;
    for (const int64_t n : {40, 1, 1, 1, 30, 1, 22}) {
      const Tensor piece = contiguous(slice(ids, 1, begin, begin + n));
      check_agrees(model.forward(piece, begin, &caches), slice(whole, 1, begin, begin + n), 0.6,
                   rounding(s));
      begin += n;
    }
    CHECK(begin == kTokens);
  });
}

}  // namespace omq
