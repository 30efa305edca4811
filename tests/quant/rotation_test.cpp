// Rotations: a block and a whole network give what they gave, part by part and all together, with
// grouped queries, biases and norms of q and k; random parts follow the seed; outliers are gone;
// and what the method quarot makes of bits.
#include "quant/rotation.h"

#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "models/model.h"
#include "models/packed_model.h"
#include "quant/calibrate.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"
#include "tests/support/shared.h"
#include "tools/source_model.h"

namespace omq::quant {
namespace {

constexpr RotationOptions kNone{.residual = false, .values = false};
constexpr RotationOptions kAll{.seed = 3, .heads = true, .down = true, .query_key = true};
constexpr RotationOptions kEvery{
    .seed = 3, .norms = true, .heads = true, .down = true, .query_key = true};

RotationOptions only(bool RotationOptions::*part) {
  RotationOptions o = kNone;
  o.*part = true;
  return o;
}

struct Shape4 {
  int64_t heads, kv_heads, head_dim, hidden, ffn;
  bool biases, qk_norm;
};

LlamaBlock random_block(Rng& rng, const Shape4& s, DType type) {
  LlamaBlock b;
  b.self_attn.heads = s.heads, b.self_attn.kv_heads = s.kv_heads, b.self_attn.head_dim = s.head_dim;
  const auto norm = [&](int64_t n, bool bias) {
    return nn::RMSNorm{random_tensor(rng, {n}, type, 0.5, 1.5),
                       bias ? normal_tensor(rng, {n}, type, 0.3) : Tensor{}};
  };
  b.input_layernorm = norm(s.hidden, s.biases);
  b.post_attention_layernorm = norm(s.hidden, s.biases);
  if (s.qk_norm) {
    b.self_attn.q_norm = norm(s.head_dim, false);
    b.self_attn.k_norm = norm(s.head_dim, false);
  }
  const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim, D = s.hidden;
  const std::pair<nn::Linear*, Shape> shapes[] = {
      {&b.self_attn.q_proj, {q, D}}, {&b.self_attn.k_proj, {kv, D}}, {&b.self_attn.v_proj, {kv, D}},
      {&b.self_attn.o_proj, {D, q}}, {&b.mlp.gate_proj, {s.ffn, D}}, {&b.mlp.up_proj, {s.ffn, D}},
      {&b.mlp.down_proj, {D, s.ffn}}};
  for (const auto& [linear, shape] : shapes) {
    linear->weight = normal_tensor(rng, shape, type, 1 / std::sqrt(static_cast<double>(shape[1])));
    if (s.biases) linear->bias = normal_tensor(rng, {shape[0]}, type, 0.3);
  }
  return b;
}

// The largest ‖a − y‖ / ‖y − x‖ of a token.
double worst_token(const Tensor& a, const Tensor& y, const Tensor& x) {
  const std::vector<double> va = values(a), vy = values(y), vx = values(x);
  const auto d = static_cast<size_t>(x.dim(-1));
  double worst = 0;
  for (size_t t = 0; t < va.size(); t += d) {
    double change = 0, update = 0;
    for (size_t i = t; i < t + d; ++i) {
      change += (va[i] - vy[i]) * (va[i] - vy[i]);
      update += (vy[i] - vx[i]) * (vy[i] - vx[i]);
    }
    worst = std::max(worst, std::sqrt(change / update));
  }
  return worst;
}

// x through the rotated block, in the basis of the block as it was.
Tensor through(const nn::Block& block, const Tensor& x, const nn::Positions& at,
               const RotationOptions& o) {
  const Rotation q = residual_rotation(x.dim(-1), o.seed);
  const auto b = block.clone();
  rotate_block(*b, 1, q, o);
  if (!o.residual) return b->forward(x, at);
  const auto turned = [&](const Tensor& t) { return to(q(to(t, DType::F64)), x.dtype()); };
  return to(q.inverse(to(b->forward(turned(x), at), DType::F64)), x.dtype());
}

nn::Positions at_start(int64_t tokens, int64_t head_dim, DType type) {
  return nn::positions(0, tokens,
                       nn::rope_tables(nn::rope_frequencies(head_dim, 1e4, {}), tokens, type));
}

Tensor some_ids(int64_t count, int64_t vocab) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<int32_t>((i * i * 31 + i * 7 + 3) % vocab));
  return Tensor::from<int32_t>(ids, {1, count});
}

}  // namespace

TEST_CASE("rotation: a block gives what it gave, part by part and all together") {
  const NoGrad off;
  for_all(
      10,
      [](Rng& rng) {
        const int64_t kv = rng.between(1, 3);
        return std::pair(Shape4{kv * rng.between(1, 3), kv, 2 * rng.between(1, 6),
                                4 * rng.between(1, 12), rng.between(2, 40), rng.coin(), rng.coin()},
                         rng);
      },
      [](const auto& in) {
        const Shape4& s = in.first;
        CAPTURE(s.heads);
        CAPTURE(s.kv_heads);
        CAPTURE(s.head_dim);
        CAPTURE(s.hidden);
        CAPTURE(s.ffn);
        CAPTURE(s.biases);
        CAPTURE(s.qk_norm);
        for (const auto& [type, bound] :
             {std::pair{DType::F64, 1e-12}, std::pair{DType::F32, 1e-5}}) {
          Rng rng = in.second;
          const LlamaBlock b = random_block(rng, s, type);
          const Tensor x = normal_tensor(rng, {2, 9, s.hidden}, type);
          const nn::Positions at = at_start(9, s.head_dim, type);
          const Tensor y = b.forward(x, at);
          for (const RotationOptions& o :
               {only(&RotationOptions::residual), only(&RotationOptions::norms),
                only(&RotationOptions::values), only(&RotationOptions::heads),
                only(&RotationOptions::down), only(&RotationOptions::query_key), kAll, kEvery})
            CHECK(worst_token(through(b, x, at, o), y, x) <= bound);
        }
      });
}

TEST_CASE("rotation: what stays online, and what does not") {
  Rng rng(4);
  const Shape4 shape{6, 2, 8, 48, 80, false, false};
  const LlamaBlock plain = random_block(rng, shape, DType::F32);
  const Rotation q = residual_rotation(48, 3);
  const auto specs = [&](const RotationOptions& o) {
    LlamaBlock b = plain;
    rotate_block(b, 0, q, o);
    for (const nn::NamedLinear& l : b.linears()) CHECK(l.linear->dense().dtype() == DType::F32);
    return online_specs(b);
  };
  CHECK(specs(only(&RotationOptions::residual)).empty());
  CHECK(specs(only(&RotationOptions::values)).empty());
  CHECK(specs(only(&RotationOptions::heads)) == OnlineSpecs{{"self_attn.o_proj", {6, 0}}});
  CHECK(specs(only(&RotationOptions::down)) == OnlineSpecs{{"mlp.down_proj", {4, 20}}});
  const OnlineSpecs both{{"self_attn.q", {2, 4}}, {"self_attn.k", {2, 4}}};
  CHECK(specs(only(&RotationOptions::query_key)) == both);
  const OnlineSpecs all = specs(kAll);
  CHECK(all.size() == 4);
  ModelConfig c;
  c.num_heads = 6, c.num_kv_heads = 2, c.head_dim = 8, c.hidden_size = 48, c.intermediate_size = 80;
  // o: 48 numbers, each a sum of 6 products; down: 80·(4 + 20); q and k: 48·6 and 16·6; twice.
  CHECK(online_operations(all, c) == 2 * (48 * 6 + 80 * 24 + 48 * 6 + 16 * 6));
  // The block itself stayed as it was, and its norms lost their gains to the matrices.
  LlamaBlock b = plain;
  rotate_block(b, 0, q, kAll);
  CHECK(bit_equal(b.input_layernorm.weight, Tensor::full({48}, 1)));
  CHECK_FALSE(bit_equal(plain.input_layernorm.weight, b.input_layernorm.weight));
  CHECK_FALSE(plain.mlp.down_proj.online.has_value());
  // Scales cannot go through what stays online.
  CHECK(LlamaBlock(plain).sites().size() == 5);
  CHECK(b.sites().size() == 3);
  // Behind norms: one transform for q, k and v, another for gate and up, gains where they were.
  OnlineSpecs behind;
  for (const char* name :
       {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"})
    behind[name] = {4, 12};
  CHECK(specs(only(&RotationOptions::norms)) == behind);
  CHECK(online_operations(behind, c) == 2 * (48 * 16 + 48 * 16));  // once a norm
  LlamaBlock n = plain;
  rotate_block(n, 0, q, only(&RotationOptions::norms));
  CHECK(n.self_attn.q_proj.online->same_as(*n.self_attn.k_proj.online));
  CHECK(n.mlp.gate_proj.online->same_as(*n.mlp.up_proj.online));
  CHECK(bit_equal(abs(n.input_layernorm.weight), abs(plain.input_layernorm.weight)));
  CHECK(bit_equal(n.self_attn.q_proj.online->right, n.self_attn.v_proj.online->right));
  CHECK_FALSE(bit_equal(n.input_layernorm.weight, plain.input_layernorm.weight));
  CHECK(bit_equal(n.mlp.down_proj.dense(), plain.mlp.down_proj.dense()));
  CHECK(n.sites().size() == 3);
}

TEST_CASE("rotation: the same seed gives the same block, another one another") {
  Rng rng(5);
  const LlamaBlock plain = random_block(rng, {6, 2, 8, 36, 40, false, false}, DType::F32);
  const auto rotated = [&](uint64_t seed, int index) {
    LlamaBlock b = plain;
    RotationOptions o = kAll;
    o.seed = seed;
    rotate_block(b, index, residual_rotation(36, seed), o);
    return b;
  };
  const LlamaBlock a = rotated(1, 0);
  CHECK(bit_equal(a.mlp.down_proj.dense(), rotated(1, 0).mlp.down_proj.dense()));
  CHECK_FALSE(bit_equal(a.self_attn.q_proj.dense(), rotated(2, 0).self_attn.q_proj.dense()));
  // Blocks share the residual's rotation, not the signs within them.
  CHECK(bit_equal(a.self_attn.q_proj.dense(), rotated(1, 1).self_attn.q_proj.dense()));
  CHECK_FALSE(bit_equal(a.mlp.down_proj.dense(), rotated(1, 1).mlp.down_proj.dense()));
  CHECK_FALSE(bit_equal(a.self_attn.v_proj.dense(), rotated(1, 1).self_attn.v_proj.dense()));
}

TEST_CASE("rotation: tables of any type, and back") {
  Rng rng(6);
  const Rotation q = residual_rotation(24, 9);
  const Tensor gain = random_tensor(rng, {24}, DType::F32, 0.5, 1.5);
  for (const DType type : {DType::F32, DType::F16, DType::BF16}) {
    const Tensor t = normal_tensor(rng, {5000, 24}, type);  // more rows than go at a time
    const Tensor r = rotate_rows(t, {}, q);
    CHECK(r.dtype() == DType::F32);
    CHECK(close(q.inverse(to(r, DType::F64)), converted(t, DType::F64), 1e-13));
    const Tensor g = rotate_rows(t, gain, q);
    CHECK(close(q.inverse(to(g, DType::F64)),
                converted(t, DType::F64) * converted(gain, DType::F64), 1e-13));
  }
}

// Tied embeddings, grouped queries, sizes of 8·12, 8·36, 2·3 heads.
TEST_CASE("rotation: the whole tiny model gives the same logits") {
  const NoGrad off;
  const auto reader = open_checkpoint(source_path("tests/fixtures/tiny-llama"));
  const Model plain = Model::load(*reader, 64, LoadAs::F32);
  const Tensor ids = some_ids(64, plain.config().vocab_size);
  const std::vector<double> want = values(plain.logits(plain.forward(ids)));
  Recipe recipe = make_recipe("quarot", {.spec = {.wbits = 4, .abits = 4}});
  CHECK(recipe.rotation == RotationOptions{.heads = true, .down = true, .query_key = true});
  for (const uint64_t seed : {uint64_t{0}, uint64_t{1}}) {
    CAPTURE(seed);
    recipe.rotation->seed = seed;
    SourceModel source(*reader, recipe);
    CHECK_FALSE(source.tied());
    Model rotated = Model::load(*reader, 64, LoadAs::F32);
    rotated.ends.embed_tokens.table = source.table("model.embed_tokens");
    rotated.ends.lm_head.weight = source.table("lm_head");
    rotated.ends.norm.weight = source.final_norm();
    for (size_t i = 0; i < rotated.blocks.size(); ++i)
      *rotated.blocks[i] =
          dynamic_cast<const LlamaBlock&>(*source.blocks().load(static_cast<int>(i)));
    CHECK(bit_equal(source.blocks().embed(ids), rotated.ends.embed_tokens(ids)));
    const std::vector<double> got = values(rotated.logits(rotated.forward(ids)));
    double worst = 0;
    for (size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(got[i] - want[i]));
    CHECK(worst < 1e-4);
    // Each of the pieces matters.
    rotated.ends.norm.weight = plain.ends.norm.weight;
    CHECK_FALSE(
        close(rotated.logits(rotated.forward(ids)), plain.logits(plain.forward(ids)), 1e-6));
  }
}

TEST_CASE("rotation: outliers of activations are spread") {
  const NoGrad off;
  Rng rng(7);
  LlamaBlock b = random_block(rng, {6, 2, 8, 48, 80, false, false}, DType::F32);
  // One channel of the residual stream and one of the ffn a hundred times as large as the others.
  Tensor x = normal_tensor(rng, {1, 32, 48}, DType::F32);
  for (int64_t t = 0; t < 32; ++t) x.data<float>()[t * 48 + 5] *= 100;
  for (int64_t i = 0; i < 48; ++i)
    std::get<Tensor>(b.mlp.up_proj.weight).data<float>()[7 * 48 + i] *= 100;
  const nn::Positions at = at_start(32, 8, DType::F32);
  // Largest entry against the root mean square, over a token's row: √n for a single outlier.
  const auto peak = [&](const Tensor& t) {
    const std::vector<double> v = values(t);
    const auto n = static_cast<size_t>(t.dim(-1));
    double sum = 0;
    for (size_t i = 0; i < v.size(); i += n) {
      double most = 0, square = 0;
      for (size_t j = i; j < i + n; ++j)
        most = std::max(most, std::abs(v[j])), square += v[j] * v[j];
      sum += most / std::sqrt(square / static_cast<double>(n));
    }
    return sum / (static_cast<double>(v.size()) / static_cast<double>(n));
  };
  const Rotation q = residual_rotation(48, 3);
  LlamaBlock r = b;
  rotate_block(r, 0, q, kAll);
  const auto before = linear_inputs(b, x, at);
  const auto after = linear_inputs(r, to(q(to(x, DType::F64)), DType::F32), at);
  CHECK(peak(before[0]) > 5.5);  // q, k, v
  CHECK(peak(before[6]) > 5.5);  // down
  CHECK(peak(after[0]) < 2.2);
  CHECK(peak(after[6]) < 2.2);
}

TEST_CASE("quarot: which rotations it makes follows from what is quantised") {
  const auto rotation = [](const QuantSpec& spec) {
    return *make_recipe("quarot", {.spec = spec, .rotation_seed = 5}).rotation;
  };
  CHECK(rotation({.wbits = 4}) == RotationOptions{.seed = 5});
  CHECK(rotation({.wbits = 4, .abits = 16, .k_bits = 4}) ==
        RotationOptions{.seed = 5, .query_key = true});
  CHECK(rotation({.wbits = 4, .abits = 8, .q_bits = 16, .k_bits = 16}) ==
        RotationOptions{.seed = 5, .heads = true, .down = true});
  CHECK(*make_recipe("quarot", {.spec = {.wbits = 4, .abits = 8}, .rotate_norms = 1}).rotation ==
        RotationOptions{
            .residual = false, .norms = true, .heads = true, .down = true, .query_key = true});
  const Recipe r = make_recipe("quarot", {.spec = {.wbits = 4, .abits = 4}});
  CHECK(r.train.epochs == 0);
  CHECK(r.transforms.empty());
  const auto shares = [](Options o) {
    const QuantSpec s = make_recipe("quarot", o).spec;
    return std::pair(s.act_clip, s.qkv_clip);
  };
  CHECK(shares({.spec = {.wbits = 4, .abits = 4}}) == std::pair(0.9, 0.95));
  CHECK(shares({.spec = {.wbits = 4}}) == std::pair(1.0, 1.0));
  CHECK(shares({.spec = {.wbits = 4, .k_bits = 4}}) == std::pair(1.0, 0.95));
  CHECK(shares({.spec = {.wbits = 4, .abits = 4}, .act_clip = 1, .qkv_clip = 0.8}) ==
        std::pair(1.0, 0.8));
  CHECK_FALSE(make_recipe("rtn", {}).rotation.has_value());
}

TEST_CASE("quarot: a block loop over rotated blocks packs what it simulates, learning or not") {
  for (const bool learns : {false, true}) {
    CAPTURE(learns);
    Recipe recipe = make_recipe(learns ? "omniquant" : "quarot",
                                {.spec = {.wbits = 4, .abits = 4}, .epochs = learns ? 1 : -1});
    recipe.rotation = kAll;
    RandomSource plain(2);
    RotatedSource source(plain, kHidden, *recipe.rotation);
    KeptBlocks packed, simulated;
    const auto reports =
        quantize(source, packed, recipe, {.ids = random_windows(3, 12)}, {}, &simulated);
    for (const BlockReport& r : reports) CHECK(r.packed_error < 1e-5);
    const NoGrad off;
    const Tensor x = source.embed(random_windows(1, 12, 8));
    const nn::Positions at = nn::positions(0, 12, small_rope(12));
    for (size_t i = 0; i < 2; ++i) {
      CHECK(online_specs(*packed.blocks[i]).size() == 4);
      CHECK(close(packed.blocks[i]->forward(x, at), simulated.blocks[i]->forward(x, at), 1e-2));
      // With its quantisers off, but for the weights, it is still near the original.
      const auto b = simulated.blocks[i]->clone();
      nn::quantize_activations(*b, {});
      CHECK(b->taps().k_online.has_value());
      CHECK(close(b->forward(x, at), source.load(static_cast<int>(i))->forward(x, at), 3e-2));
    }
  }
}

}  // namespace omq::quant
