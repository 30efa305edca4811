// The models that the tests of devices run, and how far what they give is apart.
//
// Whole models are subcases, one for each device and setting: a tool under which a kernel takes a
// hundred times as long can be given one at a time (--subcase).
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "autograd/ops.h"
#include "models/generator.h"
#include "models/packed_model.h"
#include "quant/calibrate.h"
#include "tests/models/files.h"
#include "tests/support/devices.h"
#include "tests/support/random_model.h"

namespace omq {

// Largest difference over the largest value.
inline double difference(std::span<const float> got, std::span<const float> want) {
  REQUIRE(got.size() == want.size());
  double error = 0, top = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i]));
    error = std::isnan(d) ? INFINITY : std::max(error, d);
    top = std::max(top, std::abs(static_cast<double>(want[i])));
  }
  return error / top;
}

struct Form {
  int bits = 16;
  int64_t group = 0;
  int table = 8;  // bits of embedding and head; 0: as they are
  ActivationSpec activations = {};
};

// Activations and the cache in 8 bits, or nothing quantised.
inline ActivationSpec eight_bits(bool quantised) {
  return quantised ? ActivationSpec{.activation = 8, .q = 8, .k = 8, .v = 8} : ActivationSpec{};
}

// body(reader, device) for a model of random weights and every device.
template <class F> void for_random_model(F&& body) {
  const NoGrad off;
  TempDir dir;
  write_random_model(dir / "m");
  const auto reader = open_checkpoint(dir / "m");
  for (const Device d : test_devices()) {
    CAPTURE(d);
    body(*reader, d);
  }
}

inline Model loaded(const CheckpointReader& reader, const Form& f) {
  Model model = Model::load(reader, 0, LoadAs::F32);
  if (f.bits < 16)
    for (auto& block : model.blocks)
      for (auto& [name, linear] : block->linears())
        linear->weight =
            quant::pack_nearest(linear->dense(), {.wbits = f.bits, .group_size = f.group});
  if (f.table > 0) {
    const bool tied = model.config().tie_word_embeddings;
    auto& embedding = model.ends.embed_tokens.table;
    embedding =
        quant::pack_nearest(std::get<Tensor>(embedding), {.wbits = f.table, .group_size = 32});
    model.ends.lm_head.weight =
        tied ? embedding
             : nn::Weight(quant::pack_nearest(model.ends.lm_head.dense(), {.wbits = f.table}));
  }
  for (auto& block : model.blocks) nn::quantize_activations(*block, f.activations.quant());
  return model;
}

inline std::vector<int32_t> some_ids(int64_t n, int64_t vocab) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i)
    ids.push_back(static_cast<int32_t>((i * i * 31 + i * 7 + 3) % vocab));
  return ids;
}

// body(generator, model, prompt) for a model of random weights in such a form, on every device.
template <class F> void for_random_writer(const Form& f, F&& body) {
  for_random_model([&](const CheckpointReader& reader, Device d) {
    Model model = loaded(reader, f);
    model.move_to(d);
    Generator generator(model, reader.tokenizer());
    body(generator, model, some_ids(9, model.config().vocab_size));
  });
}

// A text of so many tokens, whatever they are.
inline GenerateOptions text_of(int64_t tokens, SamplerOptions sampling) {
  GenerateOptions o;
  o.sampling = std::move(sampling);
  o.max_tokens = tokens;
  o.ignore_eos = true;
  return o;
}

// A model in memory, of units of 64 and 128 columns and last panels that are not full.
inline Model assembled(int bits, int64_t group, const ActivationSpec& activations, bool qk_norm) {
  ModelConfig c;
  c.model_type = qk_norm ? "qwen3" : "llama";
  c.hidden_size = 192, c.intermediate_size = 320, c.num_layers = 3, c.vocab_size = 131;
  c.num_heads = 6, c.num_kv_heads = 2, c.head_dim = 32, c.max_position_embeddings = 256;
  c.qk_norm = qk_norm;
  Rng rng(static_cast<uint64_t>(bits + group));
  const auto matrix = [&](int64_t rows, int64_t cols, int b, int64_t g) -> nn::Weight {
    const Tensor w =
        normal_tensor(rng, {rows, cols}, DType::F32, 1 / std::sqrt(static_cast<double>(cols)));
    return quant::pack_nearest(w, {.wbits = b, .group_size = g});
  };
  const auto gain = [&](int64_t n) { return random_tensor(rng, {n}, DType::F32, 0.5, 1.5); };
  std::vector<std::unique_ptr<LlamaBlock>> blocks;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    auto b = std::make_unique<LlamaBlock>();
    nn::Attention& a = b->self_attn;
    a.heads = c.num_heads, a.kv_heads = c.num_kv_heads, a.head_dim = c.head_dim;
    if (qk_norm)
      a.q_norm = nn::RMSNorm{gain(32), {}, 1e-6}, a.k_norm = nn::RMSNorm{gain(32), {}, 1e-6};
    a.q_proj.weight = matrix(192, 192, bits, group), a.k_proj.weight = matrix(64, 192, bits, group);
    a.v_proj.weight = matrix(64, 192, bits, group), a.o_proj.weight = matrix(192, 192, bits, group);
    b->mlp.gate_proj.weight = matrix(320, 192, bits, group);
    b->mlp.up_proj.weight = matrix(320, 192, bits, group);
    b->mlp.down_proj.weight = matrix(192, 320, bits, group);
    if (i == 1) a.v_proj.bias = random_tensor(rng, {64}, DType::F32, -1, 1);
    if (i == 2) b->mlp.up_proj.bias = random_tensor(rng, {320}, DType::F32, -1, 1);
    b->input_layernorm.weight = gain(192), b->post_attention_layernorm.weight = gain(192);
    if (i == 1) b->post_attention_layernorm.bias = random_tensor(rng, {192}, DType::F32, -0.2, 0.2);
    nn::quantize_activations(*b, activations.quant());
    blocks.push_back(std::move(b));
  }
  ModelEnds ends;
  ends.embed_tokens.table = matrix(131, 192, 8, 64);
  ends.lm_head.weight = matrix(131, 192, 8, 64);
  ends.norm.weight = gain(192);
  return Model::assemble(c, std::move(ends), std::move(blocks), 256);
}

}  // namespace omq
