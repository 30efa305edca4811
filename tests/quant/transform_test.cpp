// The equivalent transformation: with quantisers off a block gives the same output for any scales
// and shifts, at every site alone and at all together; where it starts, what it learns, and what it
// leaves in the block.
#include "quant/transform_let.h"

#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "models/model.h"
#include "quant/activations.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"
#include "tests/support/shared.h"

namespace omq::quant {
namespace {

void fill(const Tensor& p, const std::function<double(int64_t)>& value) {
  std::vector<double> v(static_cast<size_t>(p.numel()));
  for (size_t i = 0; i < v.size(); ++i) v[i] = value(static_cast<int64_t>(i));
  Tensor data = p.detach();
  on(data).copy(data, Tensor::from<double>(v, p.shape()));
}

// Scales in [¼, 4] and shifts of deviation `shift` into the learnables of the site named `only`
// ("": all); the others do nothing.
void randomise(const Transform& t, Rng& rng, double shift, const std::string& only) {
  const nn::ParamGroup g = t.params();
  for (size_t i = 0; i < g.params.size(); ++i) {
    const bool on = only.empty() || g.names[i].starts_with(only + "_");
    const bool scale = g.names[i].ends_with("_scale");
    fill(g.params[i], [&](int64_t) {
      if (scale) return on ? std::exp2(rng.uniform(-2, 2)) : 1.0;
      return on ? shift * rng.normal() : 0.0;
    });
  }
}

BlockStats stats_of(nn::Block& block, const Tensor& x, const nn::Positions& at) {
  NoGrad off;
  const auto watched = block.clone();
  StatsCollector collector(*watched);
  for (int64_t i = 0; i < x.dim(0); ++i) watched->forward(slice(x, 0, i, i + 1), at);
  return collector.take();
}

// The largest ‖a − b‖ / ‖b − x‖ of a token: what changed, against what the block adds, so that the
// residual hides nothing.
double worst_token(const Tensor& a, const Tensor& b, const Tensor& x) {
  const std::vector<double> va = values(a), vb = values(b), vx = values(x);
  const auto d = static_cast<size_t>(x.dim(-1));
  double worst = 0;
  for (size_t t = 0; t < va.size(); t += d) {
    double change = 0, update = 0;
    for (size_t i = t; i < t + d; ++i) {
      change += (va[i] - vb[i]) * (va[i] - vb[i]);
      update += (vb[i] - vx[i]) * (vb[i] - vx[i]);
    }
    worst = std::max(worst, std::sqrt(change / update));
  }
  return worst;
}

const std::string kSites[] = {"qkv", "fc1", "out", "qkt", "down", ""};

// At every site, then everywhere.
void check_equivalence(nn::Block& block, const Tensor& x, const nn::Positions& at, Rng& rng,
                       double shift, double bound) {
  NoGrad off;
  const Tensor y = block.forward(x, at);
  const auto t =
      learned_transform(block, stats_of(block, x, at), {.shift = true, .up_to_down = true});
  for (const std::string& site : kSites) {
    CAPTURE(site);
    randomise(*t, rng, shift, site);
    const auto b = block.clone();
    t->apply(*b);
    CHECK(worst_token(b->forward(x, at), y, x) <= bound);
  }
}

LlamaBlock in_dtype(const LlamaBlock& block, DType dtype) {
  LlamaBlock b = block;
  b.visit([&](std::string_view, Tensor& t) { t = converted(t, dtype); });
  return b;
}

struct Shape4 {
  int64_t heads, kv_heads, head_dim, hidden;
  bool biases;
};

LlamaBlock random_gqa_block(Rng& rng, const Shape4& s) {
  LlamaBlock b = random_block(rng);
  b.self_attn.heads = s.heads, b.self_attn.kv_heads = s.kv_heads, b.self_attn.head_dim = s.head_dim;
  const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim, D = s.hidden;
  for (nn::RMSNorm* n : {&b.input_layernorm, &b.post_attention_layernorm})
    n->weight = random_tensor(rng, {D}, DType::F32, 0.5, 1.5);
  const std::pair<nn::Linear*, Shape> shapes[] = {
      {&b.self_attn.q_proj, {q, D}}, {&b.self_attn.k_proj, {kv, D}}, {&b.self_attn.v_proj, {kv, D}},
      {&b.self_attn.o_proj, {D, q}}, {&b.mlp.gate_proj, {40, D}},    {&b.mlp.up_proj, {40, D}},
      {&b.mlp.down_proj, {D, 40}}};
  for (const auto& [linear, shape] : shapes) {
    linear->weight = random_matrix(rng, shape[0], shape[1]);
    if (s.biases) linear->bias = normal_tensor(rng, {shape[0]}, DType::F32, 0.3);
  }
  if (s.biases) b.input_layernorm.bias = normal_tensor(rng, {D}, DType::F32, 0.3);
  return b;
}

Options let_options(int wbits, int abits, int epochs) {
  Options o;
  o.spec = {.wbits = wbits, .abits = abits};
  o.epochs = epochs;
  o.let = 1;
  return o;
}

TEST_CASE("let: the block's output does not change, whatever the scales and shifts") {
  for_all(
      12,
      [](Rng& rng) {
        const int64_t kv = rng.between(1, 3);
        return std::pair(Shape4{kv * rng.between(1, 3), kv, 2 * rng.between(1, 6),
                                8 * rng.between(1, 5), rng.coin()},
                         rng);
      },
      [](const auto& in) {
        Rng rng = in.second;
        LlamaBlock narrow = random_gqa_block(rng, in.first);
        LlamaBlock wide = in_dtype(narrow, DType::F64);
        const int64_t d = in.first.head_dim;
        const auto at = [&](DType dtype) {
          return nn::positions(0, 9, nn::rope_tables(nn::rope_frequencies(d, 1e4, {}), 9, dtype));
        };
        const Tensor x = normal_tensor(rng, {2, 9, in.first.hidden});
        CAPTURE(in.first.heads);
        CAPTURE(in.first.kv_heads);
        check_equivalence(narrow, converted(x, DType::F32), at(DType::F32), rng, 1, 1e-5);
        check_equivalence(wide, x, at(DType::F64), rng, 1, 1e-13);
      });
}

TEST_CASE("let: untied q-k scales are no equivalence under rotary positions") {
  NoGrad off;
  Rng rng(3);
  LlamaBlock b = in_dtype(random_block(rng), DType::F64);
  const nn::Positions at =
      nn::positions(0, 9, nn::rope_tables(nn::rope_frequencies(8, 1e4, {}), 9, DType::F64));
  const Tensor x = normal_tensor(rng, {1, 9, kHidden}), y = b.forward(x, at);
  const auto t = learned_transform(b, stats_of(b, x, at), {.tied_pairs = false});
  randomise(*t, rng, 0, "qkt");
  LlamaBlock c = b;
  t->apply(c);
  CHECK(worst_token(c.forward(x, at), y, x) > 1e-3);
}

TEST_CASE("let: a projected scale is at least 1e-2 in size and keeps its sign") {
  Rng rng(4);
  LlamaBlock b = random_block(rng);
  const nn::Positions at = nn::positions(0, 5, small_rope(5));
  const Tensor x = normal_tensor(rng, {1, 5, kHidden}, DType::F32);
  const auto t = learned_transform(b, stats_of(b, x, at), {.shift = true});
  const std::vector<double> before = {0, 1e-40, -1e-40, 1e-3, -1e-3, 1e-2, -1e-2, 0.5, -3e4};
  const std::vector<double> after = {0.01, 0.01, -0.01, 0.01, -0.01, 0.01, -0.01, 0.5, -3e4};
  const nn::ParamGroup g = t->params();
  for (const Tensor& p : g.params)
    fill(p, [&](int64_t i) { return before[static_cast<size_t>(i) % before.size()]; });
  t->project();
  for (size_t k = 0; k < g.params.size(); ++k) {
    const std::vector<double> v = values(g.params[k]);
    for (size_t i = 0; i < v.size(); ++i) {
      const auto want = (g.names[k].ends_with("_scale") ? after : before)[i % before.size()];
      CHECK(v[i] == doctest::Approx(want).epsilon(1e-6));
    }
  }
}

TEST_CASE("let: where it starts") {
  Rng rng(5);
  LlamaBlock b = random_block(rng);
  const nn::Positions at = nn::positions(0, 7, small_rope(7));
  const Tensor x = normal_tensor(rng, {3, 7, kHidden}, DType::F32);
  const BlockStats stats = stats_of(b, x, at);
  REQUIRE(stats.size() == 5);  // norm → q,k,v · norm → gate,up · v → o · q – k · up → down
  NoGrad off;
  // By hand: the input of q, channel by channel.
  const std::vector<double> h = values(b.input_layernorm(x));
  const auto D = static_cast<size_t>(kHidden), T = size_t{7};
  for (size_t c : {size_t{0}, size_t{13}, D - 1}) {
    double abs_max = 0, middle = 0;
    for (size_t w = 0; w < 3; ++w) {
      double hi = -1e30, lo = 1e30;
      for (size_t t = 0; t < T; ++t) {
        const double v = h[(w * T + t) * D + c];
        hi = std::max(hi, v), lo = std::min(lo, v);
      }
      abs_max = std::max({abs_max, hi, -lo});
      middle = w == 0 ? (hi + lo) / 2 : 0.99 * middle + 0.01 * (hi + lo) / 2;
    }
    CHECK(values(stats[0].abs_max)[c] == doctest::Approx(abs_max).epsilon(1e-6));
    CHECK(values(stats[0].middle)[c] == doctest::Approx(middle).epsilon(1e-5));
  }
  const auto column = [&](const nn::Linear& l, size_t c, bool sign) {
    const std::vector<double> w = values(l.dense());
    double m = -1;
    for (size_t r = 0; r < w.size(); r += D) m = std::max(m, sign ? w[r + c] : std::abs(w[r + c]));
    return m;
  };
  const auto start = [&](const LetOptions& o) {
    return values(learned_transform(b, stats, o)->params().params[0]);
  };
  const double a = values(stats[0].abs_max)[5];
  const auto& attn = b.self_attn;
  const double q = column(attn.q_proj, 5, false);
  const double all = std::max({q, column(attn.k_proj, 5, false), column(attn.v_proj, 5, false)});
  CHECK(start({})[5] == doctest::Approx(std::sqrt(a / all)).epsilon(1e-5));
  CHECK(start({.all_consumers = false})[5] == doctest::Approx(std::sqrt(a / q)).epsilon(1e-5));
  CHECK(start({.alpha = 0.75, .all_consumers = false, .signed_max = true})[5] ==
        doctest::Approx(std::pow(a, 0.75) / std::pow(column(attn.q_proj, 5, true), 0.25))
            .epsilon(1e-5));
  // v → o: the largest of the query heads that share the entry; q – k: one entry a rotary pair.
  const nn::ParamGroup g = learned_transform(b, stats, {.shift = true})->params();
  CHECK(g.names == std::vector<std::string>{"qkv_scale", "fc1_scale", "out_scale", "qkt_scale",
                                            "qkv_shift", "fc1_shift", "out_shift"});
  const auto out = [&](size_t channel) {
    return std::sqrt(values(stats[2].abs_max)[channel] / column(attn.o_proj, channel, false));
  };
  CHECK(values(g.params[2])[9] == doctest::Approx(std::max(out(17), out(25))).epsilon(1e-5));
  CHECK(g.params[2].shape() == Shape{16});
  CHECK(values(g.params[3]) == std::vector<double>(8, 1.0));
  CHECK(values(g.params[4]) == std::vector<double>(32, 0.0));
  CHECK(values(learned_transform(b, stats, {.shift = true, .shift_from_middle = true})
                   ->params()
                   .params[4]) == values(stats[0].middle));
  CHECK_THROWS_WITH_AS(
      learned_transform(b, {}, {}),
      "the equivalent transformation starts from activations; give calibration text", Error);
  CHECK_THROWS_WITH_AS(learned_transform(b, stats, {.alpha = 2}), "alpha = 2: 0 to 1 wanted",
                       Error);
}

TEST_CASE("let: gradients of every learnable agree with differences") {
  Rng rng(6);
  LlamaBlock b = in_dtype(random_gqa_block(rng, {4, 2, 4, 8, true}), DType::F64);
  const nn::Positions at =
      nn::positions(0, 4, nn::rope_tables(nn::rope_frequencies(4, 1e4, {}), 4, DType::F64));
  const Tensor x = normal_tensor(rng, {1, 4, 8});
  const auto t = learned_transform(b, stats_of(b, x, at), {.shift = true, .up_to_down = true});
  // Not the output, which does not change: the transformed tensors, each weighed by random numbers.
  std::vector<Tensor> weights;
  const auto loss = [&] {
    LlamaBlock c = b;
    t->apply(c);
    Tensor total;
    size_t i = 0;
    c.visit([&](std::string_view, Tensor& p) {
      if (weights.size() <= i) weights.push_back(normal_tensor(rng, p.shape()));
      const Tensor part = sum(square(p) * weights[i++]);
      total = total.defined() ? total + part : part;
    });
    return total;
  };
  const Gradients g = backward(loss());
  for (const Tensor& p : t->params().params) {
    Tensor data = p.detach();
    const std::vector<double> got = values(g[p]);
    for (int64_t i = 0; i < p.numel(); ++i) {
      NoGrad off;
      double& v = data.data<double>()[i];
      const double kept = v, step = 1e-6;
      v = kept + step;
      const double up = loss().item<double>();
      v = kept - step;
      const double down = loss().item<double>();
      v = kept;
      CHECK(got[static_cast<size_t>(i)] ==
            doctest::Approx((up - down) / (2 * step)).epsilon(1e-5).scale(1));
    }
  }
}

TEST_CASE("let: a learned block keeps its shifts as biases, and packs what was simulated") {
  const Tensor ids = random_windows(4, 10);
  for (const int abits : {4, 8, 16}) {
    CAPTURE(abits);
    Options o = let_options(4, abits, 10);
    o.let_shift = 1;
    o.let_lr = 5e-3;
    o.let_up_to_down = true;
    if (abits == 4) o.aug_loss = 1, o.token_loss = 0;  // see below
    RandomSource source(2);
    KeptBlocks packed, simulated;
    const auto reports =
        quantize(source, packed, make_recipe("omniquant", o), {ids}, {}, &simulated);
    for (size_t i = 0; i < 2; ++i) {
      // At 4 bits ten epochs on random weights lower the official loss, and not every other.
      if (i == 0) CHECK(reports[i].epoch_loss.back() < reports[i].epoch_loss.front());
      CHECK(reports[i].packed_error < 1e-4);
      std::vector<std::string> biases;
      packed.blocks[i]->visit([&](std::string_view name, Tensor&) {
        if (name.ends_with(".bias")) biases.emplace_back(name);
      });
      CHECK(biases.size() == 2 + 6);  // both norms, every linear but down
      const auto dense = simulated.blocks[i]->linears(), codes = packed.blocks[i]->linears();
      for (size_t j = 0; j < dense.size(); ++j) {
        CHECK(bit_equal(nn::PackedIntWeight(packed_of(*codes[j].linear)).dequantize(),
                        dense[j].linear->dense()));
        CHECK(dense[j].linear->input_quant.has_value() == (abits < 16));
        CHECK(codes[j].linear->input_quant == dense[j].linear->input_quant);
      }
      CHECK(simulated.blocks[i]->taps().k.has_value() == (abits < 16));
      CHECK_FALSE(simulated.blocks[i]->taps().p.has_value());
    }
  }
}

TEST_CASE("let: it beats clipping alone where a few channels are loud") {
  const Tensor ids = random_windows(6, 12);
  const auto committed = [&](int let) {
    RandomSource source(1);
    Tensor& gain = source.blocks[0].input_layernorm.weight;
    gain.data<float>()[3] *= 30;  // an outlier channel of every token
    Options o = let_options(4, 4, 8);
    o.let = let;
    KeptBlocks sink;
    return quantize(source, sink, make_recipe("omniquant", o), {ids}).at(0).committed_loss;
  };
  CHECK(committed(1) < 0.7 * committed(0));
}

TEST_CASE("activations: each of q, k, v, p and the linears' inputs on its own") {
  NoGrad off;
  Rng rng(8);
  LlamaBlock fp = random_block(rng);
  const nn::Positions at = nn::positions(0, 6, small_rope(6));
  const Tensor x = normal_tensor(rng, {1, 6, kHidden}, DType::F32), y = fp.forward(x, at);
  for (int i = 0; i < 5; ++i) {
    CAPTURE(i);
    QuantSpec s{.wbits = 8, .q_bits = 16, .k_bits = 16, .v_bits = 16};
    int* const fields[] = {&s.abits, &s.q_bits, &s.k_bits, &s.v_bits, &s.p_bits};
    *fields[i] = 4;
    LlamaBlock b = fp;
    quantize_activations(b, s);
    CHECK(b.self_attn.q_proj.input_quant.has_value() == (i == 0));
    CHECK(b.taps().q.has_value() == (i == 1));
    CHECK(b.taps().k.has_value() == (i == 2));
    CHECK(b.taps().v.has_value() == (i == 3));
    CHECK(b.taps().p.has_value() == (i == 4));
    const double error = worst_token(b.forward(x, at), y, x);
    CHECK(error > 1e-3);
    CHECK(error < 0.6);
    *fields[i] = 8;
    quantize_activations(b, s);
    CHECK(worst_token(b.forward(x, at), y, x) < error / 4);
  }
}

TEST_CASE("slow: let on SmolLM2 (grouped queries) is an equivalence at every site") {
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: no SmolLM2; make smollm2 fetches it");
    return;
  }
  NoGrad off;
  const auto reader = open_checkpoint(*file);
  ModelSource source(*reader);
  const int64_t T = 64;
  Rng rng(9);
  Tensor x = source.embed(random_ids(rng, {1, T}, 40000));
  const nn::Positions at = nn::positions(0, T, source.rope(T));
  for (int i = 0; i < source.size(); ++i) {
    CAPTURE(i);
    const auto block = source.load(i);
    // Shifts of the size of what they shift: the normed activations of this block.
    const auto site = std::get<nn::NormToLinears>(block->sites().at(0));
    const double size = std::sqrt(static_cast<double>(mean(square((*site.norm)(x))).item<float>()));
    if (i % 7 == 0 || i + 1 == source.size()) check_equivalence(*block, x, at, rng, size, 1e-5);
    x = block->forward(x, at);
  }
}

}  // namespace
}  // namespace omq::quant
