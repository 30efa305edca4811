// Learned Kronecker transforms: with quantisers off a block gives the same output whatever has been
// learned, with grouped queries, biases and norms of q and k; what stays online, and what the
// method flatquant makes of a block.
#include "quant/transform_kronecker.h"

#include <doctest/doctest.h>

#include <cmath>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "models/packed_model.h"
#include "quant/invertible.h"
#include "quant/orthogonal.h"
#include "tests/quant/runs.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

void fill(const Tensor& p, const std::function<double(int64_t)>& value) {
  std::vector<double> v(static_cast<size_t>(p.numel()));
  for (size_t i = 0; i < v.size(); ++i) v[i] = value(static_cast<int64_t>(i));
  Tensor data = p.detach();
  on(data).copy(data, Tensor::from<double>(v, p.shape()));
}

// Scales in [¼, 4], and matrices that are 30 % of a row away from where they started.
void randomise(const Transform& t, Rng& rng) {
  const nn::ParamGroup g = t.params();
  for (size_t i = 0; i < g.params.size(); ++i) {
    const double spread = 0.3 / std::sqrt(static_cast<double>(g.params[i].dim(-1)));
    const bool scale = g.names[i].ends_with("_scale");
    fill(g.params[i],
         [&](int64_t) { return scale ? std::exp2(rng.uniform(-2, 2)) : spread * rng.normal(); });
  }
}

LlamaBlock block_of(Rng& rng, DType type, int64_t heads, int64_t kv_heads, bool extras) {
  LlamaBlock b = random_block(rng);
  b.self_attn.heads = heads, b.self_attn.kv_heads = kv_heads;
  const int64_t d = b.self_attn.head_dim;
  b.self_attn.q_proj.weight = random_matrix(rng, heads * d, kHidden);
  b.self_attn.k_proj.weight = random_matrix(rng, kv_heads * d, kHidden);
  b.self_attn.v_proj.weight = random_matrix(rng, kv_heads * d, kHidden);
  b.self_attn.o_proj.weight = random_matrix(rng, kHidden, heads * d);
  if (extras) {
    b.input_layernorm.bias = normal_tensor(rng, {kHidden}, DType::F32, 0.3);
    for (auto& [name, linear] : b.linears())
      linear->bias = normal_tensor(rng, {linear->out_features()}, DType::F32, 0.3);
    b.self_attn.q_norm = nn::RMSNorm{random_tensor(rng, {d}, DType::F32, 0.5, 1.5), {}};
    b.self_attn.k_norm = nn::RMSNorm{random_tensor(rng, {d}, DType::F32, 0.5, 1.5), {}};
  }
  b.visit([&](std::string_view, Tensor& t) { t = converted(t, type); });
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

Options w4a4(int epochs) {
  Options o;
  o.spec = {.wbits = 4, .abits = 4};
  o.epochs = epochs;
  o.batch_size = 2;
  return o;
}

}  // namespace

TEST_CASE("invertible: at first the matrix that it was given, and always with its inverse") {
  Rng rng(1);
  for (const int64_t n : {1, 2, 3, 9, 36})
    for (const int64_t count : {0, 3}) {
      CAPTURE(n);
      CAPTURE(count);
      const Tensor q = orthogonal_factor(n, Philox(4));
      const Invertible m(q, count);
      const NoGrad off;
      CHECK(m.learnable().ndim() == (count ? 3 : 2));
      const auto flat = [&](const Tensor& t) { return reshape(t, {-1, n, n}); };
      const Shape all{std::max<int64_t>(1, count), n, n};
      CHECK(close(flat(m().matrix), contiguous(expand(reshape(q, {1, n, n}), all)), 1e-28));
      fill(m.learnable(), [&](int64_t) { return 0.7 * rng.normal() / std::sqrt(double(n)); });
      const auto [p, inverse] = m();
      CHECK_FALSE(close(flat(p), contiguous(expand(reshape(q, {1, n, n}), all)), 1e-3));
      const Tensor one = matmul(flat(p), transpose(flat(inverse), 1, 2));
      const Tensor identity = matmul(q, transpose(q, 0, 1));
      CHECK(close(one, contiguous(expand(reshape(identity, {1, n, n}), all)), 1e-24));
    }
}

TEST_CASE("kronecker transform: a block gives what it gave, whatever has been learned") {
  const NoGrad off;
  const std::pair<int64_t, int64_t> heads[] = {{4, 2}, {6, 2}, {3, 3}, {1, 1}, {5, 1}};
  uint64_t seed = 1;
  for (const auto& [h, kv] : heads)
    for (const bool extras : {false, true})
      for (const auto& [type, bound] : {std::pair{DType::F64, 1e-12}, {DType::F32, 1e-5}}) {
        CAPTURE(h);
        CAPTURE(kv);
        CAPTURE(extras);
        Rng rng(++seed);
        LlamaBlock b = block_of(rng, type, h, kv, extras);
        const nn::Positions at =
            nn::positions(0, 7, nn::rope_tables(nn::rope_frequencies(8, 1e4, {}), 7, type));
        const Tensor x = normal_tensor(rng, {2, 7, kHidden}, type), y = b.forward(x, at);
        StatsCollector stats(b);
        b.forward(x, at);
        for (auto& [name, linear] : b.linears()) linear->pre = {};
        const auto t = kronecker_transform(b, stats.take(), {.query_key = true});
        for (const bool start : {true, false}) {
          if (!start) randomise(*t, rng);
          LlamaBlock c = b;
          t->project();
          t->apply(c);
          CHECK(worst_token(c.forward(x, at), y, x) <= bound);
        }
      }
}

TEST_CASE("kronecker transform: what stays online, once for all that read it") {
  Rng rng(3);
  LlamaBlock b = random_block(rng), c = b;
  const auto t = kronecker_transform(b, {}, {.query_key = true});
  const NoGrad off;
  t->apply(c);
  const OnlineSpecs specs = online_specs(c);
  CHECK(specs.size() == 9);
  CHECK(specs.at("self_attn.q_proj") == OnlineSpec{4, 8});
  CHECK(specs.at("self_attn.o_proj") == OnlineSpec{4, 0});
  CHECK(specs.at("mlp.down_proj") == OnlineSpec{8, 9});
  CHECK(c.self_attn.q_proj.online->same_as(*c.self_attn.v_proj.online));
  CHECK(c.mlp.gate_proj.online->same_as(*c.mlp.up_proj.online));
  CHECK_FALSE(c.mlp.gate_proj.online->same_as(*c.self_attn.k_proj.online));
  ModelConfig config;
  config.num_heads = 4, config.num_kv_heads = 2, config.head_dim = 8;
  config.hidden_size = kHidden, config.intermediate_size = kFfn;
  const OnlineSpec qk = specs.at("self_attn.q");
  CHECK(online_operations(specs, config) ==
        2 * (2 * 32 * 12 + 32 * 4 + 72 * 17 + (32 + 16) * (qk.left + qk.right)));
  CHECK_THROWS_WITH_AS(kronecker_transform(c, {}, {}),
                       doctest::Contains("the input of self_attn.q_proj is rotated already"),
                       Error);
  CHECK_THROWS_WITH_AS(kronecker_transform(b, {}, {.alpha = -1}), "alpha = -1: 0 to 1 wanted",
                       Error);
}

TEST_CASE("flatquant: it learns, packs what it simulates, and is better than its start") {
  const Recipe recipe = make_recipe("flatquant", w4a4(12)), start = make_recipe("flatquant", [] {
                                                              Options o = w4a4(0);
                                                              o.line.clip = "minmax",
                                                              o.line.train = "none";
                                                              return o;
                                                            }());
  CHECK(recipe.kronecker->query_key);
  CHECK(recipe.train.unit_loss);
  CHECK_FALSE(recipe.train.full_inputs);
  const Run run(recipe), before(start);
  const NoGrad off;
  const Tensor x = normal_tensor(*std::make_unique<Rng>(9), {1, 12, kHidden}, DType::F32);
  const nn::Positions at = nn::positions(0, 12, small_rope(12));
  for (size_t i = 0; i < 2; ++i) {
    const BlockReport& r = run.reports[i];
    CHECK(r.packed_error < 1e-5);
    CHECK(r.epoch_loss.back() < 0.97 * r.epoch_loss.front());
    CHECK(r.committed_loss < before.reports[i].committed_loss);
    CHECK(r.sites.size() == 3);  // scales of qkv, fc1 and down
    const Tensor y = run.simulated_block(i).forward(x, at);
    CHECK(close(run.packed_block(i).forward(x, at), y, 1e-6));
  }
}

TEST_CASE("learned shares of activations: one a stage, and what is packed has them") {
  Options o = w4a4(6);
  CHECK_FALSE(make_recipe("omniquant", o).train.act_clips);
  o.learn_act_clip = 0;
  CHECK_FALSE(make_recipe("flatquant", o).train.act_clips);
  o.learn_act_clip = 1;
  const Recipe recipe = make_recipe("flatquant", o);
  Rng rng(4);
  LlamaBlock fp = random_block(rng);
  const BlockMethod method(recipe, fp);
  std::vector<std::string> names;
  for (const Learnable& l : method.learnables())
    if (l.name.ends_with("lac.clip_logit")) {
      names.push_back(l.name.substr(0, l.name.find(".lac")));
      CHECK(values(l.value)[0] == doctest::Approx(std::log(9.0)));  // σ of it: 0.9
    }
  CHECK(names == std::vector<std::string>{"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj",
                                          "mlp.down_proj"});
  const Run run(recipe);
  const NoGrad off;
  const Tensor x = normal_tensor(rng, {1, 12, kHidden}, DType::F32);
  const nn::Positions at = nn::positions(0, 12, small_rope(12));
  for (size_t i = 0; i < 2; ++i) {
    CHECK(run.reports[i].packed_error < 1e-5);
    LlamaBlock packed = run.packed_block(i), simulated = run.simulated_block(i);
    for (size_t l = 0; l < 7; ++l) {
      const nn::Linear &p = *packed.linears()[l].linear, &s = *simulated.linears()[l].linear;
      CHECK(p.input_quant == s.input_quant);
      CHECK(p.input_quant->clip != 0.9);
      CHECK(values(p.input_clip)[0] == p.input_quant->clip);  // what the file will say
      CHECK_FALSE(s.input_clip.defined());
    }
    CHECK(packed.self_attn.q_proj.input_quant == packed.self_attn.v_proj.input_quant);
    CHECK(close(packed.forward(x, at), simulated.forward(x, at), 1e-6));
  }
  o.spec.abits = 16;
  CHECK_THROWS_WITH_AS(make_recipe("flatquant", o), doctest::Contains("add --abits"), Error);
  o.spec.abits = 4;
  CHECK_THROWS_WITH_AS(make_recipe("rtn", o), doctest::Contains("add --train clip"), Error);
}

TEST_CASE("flatquant: what its options mean") {
  const auto spec = [](const char* bits) {
    Options o;
    o.spec = QuantSpec::parse(bits);
    return make_recipe("flatquant", o);
  };
  CHECK(spec("w4a4").spec.act_clip == 0.9);
  CHECK(spec("w4a4").spec.qkv_clip == 0.95);
  CHECK(spec("w4a16").spec.act_clip == 1);
  CHECK_FALSE(spec("w4a16").kronecker->query_key);
  CHECK(spec("w4a4").train.lr.at("lwc") == 5e-2);
  CHECK(spec("w4a4").train.act_clips);
  CHECK_FALSE(spec("w4a16").train.act_clips);
  Options o = w4a4(3);
  o.full_inputs = 1;
  o.alpha = 0.5;
  CHECK(make_recipe("flatquant", o).train.full_inputs);
  CHECK(make_recipe("flatquant", o).kronecker->alpha == 0.5);
  CHECK_FALSE(make_recipe("omniquant", w4a4(3)).train.full_inputs);
  // Weights alone, on quarot's rotated residual stream: there is nothing online in the way.
  o = {};
  o.line = {"kronecker", "lwc", "", "clip"};
  CHECK(make_recipe("quarot", o).rotation);
  o.spec.abits = 4;
  CHECK_THROWS_WITH_AS(make_recipe("quarot", o), doctest::Contains("take --method flatquant"),
                       Error);
  o.line = {"", "", "", "norms"};
  o.line.clip = "minmax";
  CHECK_THROWS_WITH_AS(make_recipe("flatquant", o),
                       doctest::Contains("norms that learn after rounding do not see it"), Error);
}

}  // namespace omq::quant
