// The audit: it passes on random blocks with grouped queries for every method and setting, says
// what it looked at, and fails when a transform, a rounder or a gradient is broken on purpose.
#include "quant/audit.h"

#include <doctest/doctest.h>

#include <cmath>
#include <set>

#include "autograd/ops.h"
#include "quant/audit_parts.h"
#include "quant/calibrate.h"
#include "tests/quant/blocks.h"

namespace omq::quant {
namespace {

using Checks = std::vector<AuditCheck>;

Checks audited(const Recipe& recipe, uint64_t seed = 2) {
  Rng rng(seed);
  LlamaBlock fp = random_block(rng);
  const AuditInputs in{normal_tensor(rng, {1, 9, kHidden}, DType::F32),
                       nn::positions(0, 9, small_rope(9))};
  Checks all;
  const bool passed =
      audit_block(recipe, fp, in, {.seed = seed}, [&](const AuditCheck& c) { all.push_back(c); });
  CHECK(passed == std::all_of(all.begin(), all.end(), [](auto& c) { return c.ok(); }));
  return all;
}

std::string failures(const Checks& all) {
  std::string text;
  for (const AuditCheck& c : all)
    if (!c.ok()) text += fmt::format("{}{}", text.empty() ? "" : ", ", c.name);
  return text;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

bool has(const Checks& all, const std::string& name) {
  return std::any_of(all.begin(), all.end(), [&](auto& c) { return c.name == name; });
}

Options options_of(const QuantSpec& spec) {
  Options o;
  o.spec = spec;
  return o;
}

TEST_CASE("audit: every method passes, at every kind of setting") {
  const QuantSpec settings[] = {
      {.wbits = 4, .group_size = 32},
      {.wbits = 3, .group_size = 40, .symmetric = true},
      {.wbits = 2},
      {.wbits = 4, .abits = 4},
      {.wbits = 6, .abits = 8, .group_size = 64, .k_bits = 4, .p_bits = 8},
  };
  for (const QuantSpec& spec : settings)
    for (const auto& [name, recipe] : audited_recipes(options_of(spec))) {
      CAPTURE(spec.to_string());
      CAPTURE(name);
      const Checks all = audited(recipe);
      for (const AuditCheck& c : all) {
        INFO(c.name << ": " << c.worst << " of " << c.bound << " in " << c.where << " " << c.fault);
        CHECK(c.ok());
      }
      CHECK(has(all, "packed = simulated"));
    }
}

TEST_CASE("audit: every method's every learnable and site is looked at") {
  std::set<std::string_view> audited_methods;
  const auto recipes = audited_recipes(options_of({.wbits = 4, .group_size = 32}));
  for (const auto& [name, recipe] : recipes) audited_methods.insert(recipe.name);
  for (const MethodInfo& m : methods())
    CHECK(audited_methods.contains(m.name) == (m.name != "best"));  // it is one of the others

  for (const auto& [name, recipe] : recipes) {
    CAPTURE(name);
    const Checks all = audited(recipe);
    Rng rng(2);
    LlamaBlock fp = random_block(rng);
    BlockStats stats(fp.sites().size());
    for (const auto& site : {0, 1, 2, 4})
      stats[static_cast<size_t>(site)].abs_max = Tensor::full({site == 4 ? kFfn : kHidden}, 1);
    const BlockMethod method(recipe, fp, stats);
    for (const Learnable& l : method.learnables()) {
      CAPTURE(l.name);
      const std::string kind = l.name.substr(l.name.rfind('.', l.name.rfind('.') - 1) + 1);
      CHECK(has(all, "gradient of " + kind));
      CHECK(has(all, "gradient in F32, " + kind.substr(0, kind.find('.'))));
    }
    for (const std::string site : {"qkv", "fc1", "out", "qkt", "down"})
      CHECK(has(all, fmt::format("equivalence of {}", site)) ==
            (!recipe.transforms.empty() &&
             (site != "qkt" || !recipe.kronecker || recipe.kronecker->query_key)));
    CHECK(has(all, "packed kernels, 1 token"));
    for (const char* part : {"residual", "values", "heads", "down", "query_key"})
      CHECK(has(all, fmt::format("rotation of {}", part)) == recipe.rotation.has_value());
  }
}

TEST_CASE("audit: what the options forbid is left out") {
  Options o = options_of({.wbits = 4, .abits = 4});
  o.let = 0;
  CHECK(audited_recipes(o).size() == methods().size() - 1);
  for (const auto& [name, recipe] : audited_recipes(o))
    CHECK(recipe.transforms.empty() == !recipe.kronecker);
  o.let = -1, o.let_shift = 0;
  const Checks all = audited(audited_recipes(o).front().recipe);
  CHECK(has(all, "gradient of let.qkv_scale"));
  CHECK_FALSE(has(all, "gradient of let.qkv_shift"));
}

TEST_CASE("audit: the official q-k scale is no equivalence") {
  Options o = options_of({.wbits = 4, .abits = 4});
  o.untied_pairs = true;
  CHECK(failures(audited(audited_recipes(o).front().recipe)) ==
        "equivalence of qkt, equivalence of all sites");
}

// ---- broken on purpose ----

Recipe sound(bool let = true) {
  Options o = options_of({.wbits = 4, .group_size = 32});
  o.let = let;
  return make_recipe("omniquant", o);
}

// Scales the gain of the first norm and forgets the matrices behind it.
struct HalfTransform final : Transform {
  Tensor scale;
  void apply(nn::Block& b) const override {
    nn::RMSNorm& norm = *std::get<nn::NormToLinears>(b.sites().at(0)).norm;
    norm.weight = norm.weight * scale;
  }
  nn::ParamGroup params() const override {
    return {.name = "let", .params = {scale}, .names = {"half_scale"}};
  }
};

TEST_CASE("audit: a transform that is no equivalence is found") {
  Recipe r = sound(false);
  r.train.lr["let"] = 1;
  r.transforms = {[](nn::Block& fp, const BlockStats&) {
    auto t = std::make_unique<HalfTransform>();
    const DType type = fp.linears().at(0).linear->dense().dtype();
    t->scale = parameter(Tensor::full({kHidden}, 1, type));
    return t;
  }};
  CHECK(failures(audited(r)) == "equivalence of half, equivalence of all sites");
}

// ---- rounders ----

struct Bent final : Rounder {
  std::function<int(int code, int max_code)> bend;
  Tensor codes(const Tensor& w, const Grid& grid, GroupSpec spec,
               const Tensor& hessian) const override {
    Tensor q = round_nearest()->codes(w, grid, spec, hessian);
    for (int64_t i = 0; i < q.numel(); ++i)
      q.data<uint8_t>()[i] = static_cast<uint8_t>(bend(q.data<uint8_t>()[i], spec.max_code()));
    return q;
  }
};

TEST_CASE("audit: a rounder that is off is found") {
  const auto with = [](std::function<int(int, int)> bend) {
    Recipe r = sound();
    auto rounder = std::make_shared<Bent>();
    rounder->bend = std::move(bend);
    r.rounder = rounder;
    return audited(r);
  };
  CHECK(failures(with([](int c, int) { return c; })).empty());
  CHECK(failures(with([](int c, int top) { return std::min(c + 1, top); })) ==
        "committed = trained");
  CHECK(failures(with([](int, int top) { return top; })) == "committed = trained");
  const Checks all = with([](int c, int top) { return c == 3 ? top + 1 : c; });
  CHECK(failures(all) == "packed = simulated");
  CHECK(contains(all.back().fault, "code 16 at row"));
}

// ---- gradients ----

// A learned clip whose scale passes `factor` times the gradient that it should, in one float type
// or in both.
struct BentClip final : Clip {
  std::unique_ptr<Clip> right;
  double factor = 1;
  bool in_f32 = true, in_f64 = true;
  Grid grid(const Tensor& w) const override {
    Grid g = right->grid(w);
    const bool bent = w.dtype() == DType::F64 ? in_f64 : in_f32;
    g.scale = record("bent", g.scale.detach(), {g.scale},
                     [by = bent ? factor : 1](const Tensor& dy) -> Grads { return {dy * by}; });
    return g;
  }
  nn::ParamGroup params() const override { return right->params(); }
};

TEST_CASE("audit: a gradient that is off is found, in either type") {
  const auto with = [](double factor, bool in_f32, bool in_f64) {
    Recipe r = sound();
    r.objective = block_mse();  // where a thousandth of every gradient is beyond the bounds
    r.clip = [=](const Tensor& w, GroupSpec spec) {
      auto clip = std::make_unique<BentClip>();
      clip->right = learned_clip(w, spec);
      clip->factor = factor, clip->in_f32 = in_f32, clip->in_f64 = in_f64;
      return clip;
    };
    return failures(audited(r));
  };
  const std::string by_differences =
      "gradient of let.qkv_scale, gradient of let.fc1_scale, gradient of let.out_scale, "
      "gradient of let.qkt_scale, gradient of lwc.gamma_logit, gradient of lwc.beta_logit";
  CHECK(with(1, true, true).empty());
  CHECK(with(1.001, true, true) == by_differences);
  CHECK(with(1.01, false, true) == by_differences + ", gradient in F32, let, gradient in F32, lwc");
  CHECK(with(1.01, true, false) == "gradient in F32, let, gradient in F32, lwc");
  CHECK(with(NAN, true, false) == "gradient in F32, let, gradient in F32, lwc");
}

TEST_CASE("audit: what fails at one random point is tried at a second, and says so") {
  const AuditCheck fine{"a", "b", 0.5, 1, "", ""}, off{"a", "b", 2, 1, "", ""},
      fault{"a", "b", 0, 1, "", "no memory"};
  struct Points {
    AuditCheck first, second;
    int tried;
    bool ok;
    std::string compared;
  };
  for (const Points& p : {Points{fine, off, 1, true, "b"},
                          {off, fine, 2, true, "b; 2nd point"},
                          {off, off, 2, false, "b"},
                          {off, fault, 2, false, "b"},
                          {fault, fine, 1, false, "b"}}) {
    const AuditCheck steady{"c", "d", 0.25, 1, "", ""};
    std::vector<uint64_t> seeds;
    Checks told;
    detail::at_two_points(
        [&](uint64_t seed) {
          seeds.push_back(seed);
          return Checks{seeds.size() == 1 ? p.first : p.second, steady};
        },
        7, [&](const AuditCheck& c) { told.push_back(c); });
    CHECK(static_cast<int>(seeds.size()) == p.tried);
    CHECK(std::set(seeds.begin(), seeds.end()).size() == seeds.size());
    REQUIRE(told.size() == 2);
    CHECK(told[0].ok() == p.ok);
    CHECK(told[0].compared == p.compared);
    CHECK(told[1].compared == "d");
  }
}

TEST_CASE("audit: a learned transformation behind a rotation is one") {
  Recipe r = make_recipe("omniquant", options_of({.wbits = 4, .abits = 4}));
  r.rotation = rotations_for(r.spec, 3);
  const Checks all = audited(r);
  CHECK(failures(all).empty());
  for (const char* name : {"equivalence of qkv", "equivalence of fc1", "equivalence of qkt"})
    CHECK(has(all, name));
  CHECK_FALSE(has(all, "equivalence of out"));
  r.rotation->heads = false;
  const Checks fused = audited(r);
  CHECK(failures(fused).empty());
  CHECK(has(fused, "equivalence of out"));
}

// A channel of the residual stream has a part of its own, which no rotation of the stream respects.
struct UnevenBlock final : nn::Block {
  LlamaBlock inner;
  Tensor forward(const Tensor& x, const nn::Positions& at, nn::KVCache* cache) const override {
    std::vector<double> gain(kHidden, 1);
    gain[3] = 2;
    return inner.forward(x * to(Tensor::from<double>(gain, {kHidden}), x.dtype()), at, cache);
  }
  std::unique_ptr<Block> clone() const override { return std::make_unique<UnevenBlock>(*this); }
  void visit(const nn::VisitFn& v) override { inner.visit(v); }
  std::vector<nn::NamedLinear> linears() override { return inner.linears(); }
  std::vector<nn::Site> sites() override { return inner.sites(); }
  nn::Attention::Taps& taps() override { return inner.taps(); }
};

TEST_CASE("audit: a rotation that is no equivalence is found") {
  Rng rng(2);
  UnevenBlock fp;
  fp.inner = random_block(rng);
  const AuditInputs in{normal_tensor(rng, {1, 9, kHidden}, DType::F32),
                       nn::positions(0, 9, small_rope(9))};
  Checks all;
  CHECK_FALSE(audit_block(make_recipe("quarot", options_of({.wbits = 4, .abits = 4})), fp, in, {},
                          [&](const AuditCheck& c) { all.push_back(c); }));
  CHECK(failures(all) == "rotation of residual, all rotations");
}

// β is learned, but its gradient is dropped on the way.
TEST_CASE("audit: a gradient that is forgotten is found") {
  Recipe r = sound(false);
  struct Forgetful final : Clip {
    std::unique_ptr<Clip> right;
    GroupSpec spec;
    Grid grid(const Tensor& w) const override {
      const Range range = group_range(w, spec);
      const auto p = right->params().params;
      return affine_grid(sigmoid(p[0]) * range.hi, sigmoid(p[1].detach()) * range.lo, spec);
    }
    nn::ParamGroup params() const override { return right->params(); }
  };
  r.clip = [](const Tensor& w, GroupSpec spec) {
    auto clip = std::make_unique<Forgetful>();
    clip->right = learned_clip(w, spec);
    clip->spec = spec;
    return clip;
  };
  const Checks all = audited(r);
  CHECK(failures(all) == "gradient of lwc.beta_logit");
  for (const AuditCheck& c : all)
    if (!c.ok()) CHECK(contains(c.where, "lwc.beta_logit"));
}

}  // namespace
}  // namespace omq::quant
