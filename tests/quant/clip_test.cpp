// Clips: min–max and learned, as objects. The closed form of the straight-through gradient is held
// by tests/autograd/ste_test.cpp; here stand the vectors that the official code computed (spec
// omniquant §2.7) through the very objects that calibration uses.
#include "quant/clip.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "quant/rounder.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq::quant {
namespace {

const Tensor& row() {
  static const Tensor x =
      Tensor::from<float>({-0.9f, -0.31f, -0.05f, 0.02f, 0.11f, 0.27f, 0.44f, 1.2f}, {1, 8});
  return x;
}
const Tensor& upstream() {
  static const Tensor g = Tensor::from<float>({1, -2, 0.5f, 3, -1, 2, -0.5f, 4}, {1, 8});
  return g;
}

std::vector<int> codes_of(const Tensor& w, const Grid& g, GroupSpec s) {
  std::vector<int> out;
  for (const uint8_t c :
       round_nearest()->codes(w, {g.scale.detach(), g.zero}, s, {}).to_vector<uint8_t>())
    out.push_back(c);
  return out;
}

void fill(const Tensor& p, double value) {
  Tensor t = p.detach();
  on(t).copy(t, Tensor::full(p.shape(), value));
}

// A learned clip whose two logits, the same for all groups, are u and l.
std::unique_ptr<Clip> learned(const Tensor& w, GroupSpec s, double u, double l) {
  auto clip = learned_clip(w, s);
  const std::vector<Tensor> p = clip->params().params;
  REQUIRE(p.size() == 2);
  fill(p[0], u);
  fill(p[1], l);
  return clip;
}

TEST_CASE("clip: round to nearest gives the official vector") {
  const GroupSpec spec{.bits = 4};
  const Grid g = minmax_clip(row(), spec)->grid(row());
  CHECK(g.scale.item<float>() == doctest::Approx(0.14).epsilon(1e-6));
  CHECK(g.zero.item<float>() == 6);
  CHECK(codes_of(row(), g, spec) == std::vector<int>{0, 4, 6, 6, 7, 8, 9, 15});
  CHECK(minmax_clip(row(), spec)->params().params.empty());
}

TEST_CASE("clip: learned clipping gives the official vectors, gradients too") {
  struct {
    int bits;
    double u, l, h, z;
    std::vector<int> codes;
    double du, dl;
  } const cases[] = {
      {3, 4, 4, 0.29460412, 3, {0, 2, 3, 3, 3, 4, 4, 7}, 0.00098634, 0.00073976},
      {2, 1, 0, 0.44242343, 1, {0, 0, 1, 1, 1, 2, 2, 3}, 0.67200857, 0.64086449},
  };
  for (const auto& c : cases) {
    CAPTURE(c.bits);
    const GroupSpec spec{.bits = c.bits, .end_codes_learn = true};
    const auto clip = learned(row(), spec, c.u, c.l);
    const Grid g = clip->grid(row());
    CHECK(g.scale.item<float>() == doctest::Approx(c.h).epsilon(1e-6));
    CHECK(g.zero.item<float>() == c.z);
    CHECK(codes_of(row(), g, spec) == c.codes);
    const Gradients d = backward(sum(fake_quant(row(), g.scale, g.zero, spec) * upstream()));
    const auto p = clip->params().params;
    CHECK(d[p[0]].item<float>() == doctest::Approx(c.du).epsilon(1e-5));
    CHECK(d[p[1]].item<float>() == doctest::Approx(c.dl).epsilon(1e-5));
  }
}

TEST_CASE("clip: the factors start at sigma(4), one pair for each row and group") {
  Rng rng(3);
  const GroupSpec spec{.bits = 4, .group_size = 32};
  const Tensor w = normal_tensor(rng, {5, 72}, DType::F32);
  const auto clip = learned_clip(w, spec);
  const nn::ParamGroup p = clip->params();
  CHECK(p.name == "lwc");
  for (const Tensor& t : p.params) {
    CHECK(t.shape() == Shape{5, 3});
    CHECK(needs_grad(t));
    CHECK(t.to_vector<float>() == std::vector<float>(15, 4.0f));
  }
  const Grid whole = minmax_clip(w, spec)->grid(w), clipped = clip->grid(w);
  const float sigma = 1 / (1 + std::exp(-4.0f));
  CHECK(close(clipped.scale, whole.scale * static_cast<double>(sigma), 1e-12));
  const auto wide = learned_clip(w, spec, {.logit = 30})->grid(w);  // σ(30) is 1 in F32
  CHECK(bit_equal(wide.scale, whole.scale));
  CHECK(bit_equal(wide.zero, whole.zero));
}

// Σ over tokens of (Σ over a group's columns of x·(ŵ − w))² at a share of the range, by plain
// loops.
double error_at(const Tensor& w, const Tensor& x, int64_t row, int64_t begin, int64_t end,
                double share, int bits) {
  const auto at = [](const Tensor& t, int64_t i, int64_t j) {
    return static_cast<double>(t.data<float>()[i * t.dim(1) + j]);
  };
  double hi = 0, lo = 0;
  for (int64_t c = begin; c < end; ++c)
    hi = std::max(hi, at(w, row, c)), lo = std::min(lo, at(w, row, c));
  const int top = (1 << bits) - 1;
  const double h = share * (hi - lo) / top;
  const double z = std::clamp(std::nearbyint(-share * lo / h), 0.0, static_cast<double>(top));
  double total = 0;
  for (int64_t t = 0; t < x.dim(0); ++t) {
    double y = 0;
    for (int64_t c = begin; c < end; ++c) {
      const double v = at(w, row, c);
      const double q = std::clamp(std::nearbyint(v / h) + z, 0.0, static_cast<double>(top));
      y += at(x, t, c) * ((q - z) * h - v);
    }
    total += y * y;
  }
  return total;
}

TEST_CASE("clip: a searched start is the best of ten for every row and group") {
  Rng rng(12);
  const GroupSpec spec{.bits = 3, .group_size = 16};
  const Tensor w = normal_tensor(rng, {6, 40}, DType::F32);  // the last group has 8 columns
  const Tensor x = normal_tensor(rng, {25, 40}, DType::F32);
  const auto clip = learned_clip(w, spec, {.search = true});
  CHECK(clip->starts_from_inputs());
  clip->start(w, x);
  const std::vector<float> u = clip->params().params[0].to_vector<float>(),
                           l = clip->params().params[1].to_vector<float>();
  CHECK(u == l);
  int unclipped = 0;
  for (int64_t r = 0; r < 6; ++r)
    for (int64_t g = 0; g < 3; ++g) {
      const int64_t begin = 16 * g, end = std::min<int64_t>(40, begin + 16);
      double least = error_at(w, x, r, begin, end, 1 / (1 + std::exp(-4.0)), spec.bits);
      for (int k = 1; k < 10; ++k)
        least = std::min(least, error_at(w, x, r, begin, end, 1 - 0.05 * k, spec.bits));
      const double logit = static_cast<double>(u[static_cast<size_t>(3 * r + g)]);
      unclipped += logit == 4;
      const double found = error_at(w, x, r, begin, end, 1 / (1 + std::exp(-logit)), spec.bits);
      CHECK(found <= least * 1.001);
    }
  CHECK(unclipped < 18);
  CHECK_FALSE(learned_clip(w, spec)->starts_from_inputs());

  // Inputs of nothing, or of no number, leave the usual start.
  for (const float value : {0.0f, std::nanf("")}) {
    const auto usual = learned_clip(w, spec, {.search = true});
    usual->start(w, Tensor::full({4, 40}, value));
    CHECK(usual->params().params[0].to_vector<float>() == std::vector<float>(18, 4.0f));
  }

  // Weights that no input reaches may be clipped, which makes the step of the others smaller.
  const Tensor lonely = normal_tensor(rng, {1, 40}, DType::F32);
  lonely.data<float>()[3] = 20;
  lonely.data<float>()[4] = -20;
  for (int64_t t = 0; t < 25; ++t) x.data<float>()[t * 40 + 3] = x.data<float>()[t * 40 + 4] = 0;
  const auto far = learned_clip(lonely, {.bits = 8}, {.search = true});
  far->start(lonely, x);
  CHECK(far->params().params[0].item<float>() < std::log(0.7f / 0.3f));
}

TEST_CASE("clip: the searched grid has the least error of its shares, whatever the groups") {
  for (const bool symmetric : {false, true})
    for (const int64_t group_size : {int64_t{0}, int64_t{16}, int64_t{24}}) {  // the last is short
      CAPTURE(symmetric);
      CAPTURE(group_size);
      const GroupSpec spec{.bits = 3, .group_size = group_size, .symmetric = symmetric};
      Rng rng(11);
      Tensor w = normal_tensor(rng, {5, 40}, DType::F32);
      w.data<float>()[3] = 9;  // an outlier pays for being clipped
      const Grid whole = minmax_clip(w, spec)->grid(w), found = searched_clip(w, spec)->grid(w);
      const auto error = [&](const Grid& g, int64_t row, int64_t group) {
        const Tensor got = fake_quant(w, g.scale, g.zero, spec);
        const int64_t width = spec.group_cols(40);
        double sum = 0;
        for (int64_t i = group * width; i < std::min<int64_t>(40, (group + 1) * width); ++i) {
          const double d = got.data<float>()[row * 40 + i] - w.data<float>()[row * 40 + i];
          sum += d * d;
        }
        return sum;
      };
      int better = 0;
      for (int64_t r = 0; r < 5; ++r)
        for (int64_t g = 0; g < spec.groups(40); ++g) {
          const double least = error(found, r, g);
          for (int step = 0; step <= 25; ++step) {
            const double share = 1 - 0.02 * step;
            const Range range = group_range(w, spec);
            const Grid other = affine_grid(range.hi * share, range.lo * share, spec);
            CHECK(least <= error(other, r, g) * (1 + 1e-5));
          }
          better += least < 0.9 * error(whole, r, g);
        }
      CHECK(better > 0);
    }
}

TEST_CASE("clip: symmetric uses every code around the middle one") {
  // h = max|w|/(2ᵇ⁻¹ − ½): the ends lie half a step beyond the last codes on either side.
  const GroupSpec spec{.bits = 4, .symmetric = true, .end_codes_learn = true};
  const auto clip = learned(row(), spec, 1, 2);
  const Grid g = clip->grid(row());
  const double sigma1 = 1 / (1 + std::exp(-1.0));
  CHECK(g.scale.item<float>() == doctest::Approx(sigma1 * 1.2 / 7.5).epsilon(1e-6));
  CHECK(g.zero.item<float>() == 8);
  const Gradients d = backward(sum(fake_quant(row(), g.scale, g.zero, spec) * upstream()));
  const auto p = clip->params().params;
  // S of §2.6 by hand: codes 0 5 8 8 9 11 13 15 (the last one clamped), h = 0.116969…
  double S = 0;
  const double h = sigma1 * 1.2 / 7.5;
  for (int64_t i = 0; i < 8; ++i) {
    const double x = static_cast<double>(row().data<float>()[i]);
    const double t = std::nearbyint(x / h) + 8, q = std::clamp(t, 0.0, 15.0);
    S += static_cast<double>(upstream().data<float>()[i]) * (q - 8 - (t == q ? x / h : 0));
  }
  CHECK(d[p[0]].item<float>() ==
        doctest::Approx(S * 1.2 * sigma1 * (1 - sigma1) / 7.5).epsilon(1e-4));
  CHECK((!d.contains(p[1]) || d[p[1]].item<float>() == 0.0f));  // the smaller side gets nothing
}

TEST_CASE("clip: both sides of a symmetric range share the gradient when they are equal") {
  const GroupSpec spec{.bits = 3, .symmetric = true};
  const Tensor w = Tensor::from<float>({-1, 0.3f, 0.2f, 1}, {1, 4});
  const auto clip = learned(w, spec, 0.5, 0.5);
  const Grid g = clip->grid(w);
  const Gradients d = backward(sum(g.scale));
  const auto p = clip->params().params;
  CHECK(d[p[0]].item<float>() == doctest::Approx(d[p[1]].item<float>()));
  CHECK(d[p[0]].item<float>() > 0);
}

TEST_CASE("clip: the range follows a weight that was transformed") {
  Rng rng(4);
  for (const bool symmetric : {false, true}) {
    const GroupSpec spec{.bits = 4, .group_size = 16, .symmetric = symmetric};
    const Tensor w = normal_tensor(rng, {6, 32}, DType::F32);
    const auto clip = learned_clip(w, spec);
    const Grid before = clip->grid(w), twice = clip->grid(w * 2.0);
    CHECK(close(twice.scale, before.scale * 2.0, 1e-13));
    CHECK(bit_equal(twice.zero, before.zero));
    CHECK(bit_equal(clip->grid(w).scale, before.scale));
    // A transform's learnable reaches the loss through the range too.
    const Tensor s = parameter(Tensor::full({1, 32}, 2));
    const Gradients d = backward(sum(clip->grid(w * s).scale));
    CHECK(d.contains(s));
    double total = 0;  // scale is linear in s, so Σ s·∂/∂s is the sum itself
    for (const double v : values(d[s] * 2.0)) total += v;
    double sum_of_scales = 0;
    for (const double v : values(twice.scale)) sum_of_scales += v;
    CHECK(total == doctest::Approx(sum_of_scales).epsilon(1e-5));
  }
}

TEST_CASE("clip: a silent row has the smallest scale and keeps its zeros") {
  for (const bool symmetric : {false, true}) {
    const GroupSpec spec{.bits = 4, .symmetric = symmetric};
    const Tensor w = Tensor::zeros({2, 8});
    for (const bool learns : {false, true}) {
      const Grid g = (learns ? learned_clip(w, spec) : minmax_clip(w, spec))->grid(w);
      CHECK(g.scale.to_vector<float>() == std::vector<float>(2, 1e-5f));
      CHECK(g.zero.to_vector<float>() == std::vector<float>(2, symmetric ? 8.0f : 0.0f));
      CHECK(bit_equal(fake_quant(w, g.scale.detach(), g.zero, spec), w));
    }
  }
}

TEST_CASE("clip: round to nearest is off by half a step at most") {
  for_all(
      60, [](Rng& rng) { return rng; },
      [](Rng rng) {
        const GroupSpec spec{.bits = static_cast<int>(rng.between(2, 8)),
                             .group_size = rng.between(0, 2) * 20,
                             .symmetric = rng.coin()};
        const double shift = rng.uniform(-2, 2);  // rows of one sign among them
        const Tensor w = random_tensor(rng, {rng.between(1, 9), rng.between(1, 72)}, DType::F32,
                                       shift - 1, shift + 1);
        CAPTURE(spec.bits);
        CAPTURE(spec.group_size);
        CAPTURE(spec.symmetric);
        CAPTURE(w.shape());
        const Grid g = minmax_clip(w, spec)->grid(w);
        const Tensor y = fake_quant(w, g.scale, g.zero, spec);
        const int64_t cols = w.dim(1), groups = spec.groups(cols);
        int64_t far = 0;
        for (int64_t i = 0; i < w.numel(); ++i) {
          const int64_t at = i / cols * groups + i % cols / spec.group_cols(cols);
          const float h = g.scale.data<float>()[at];
          if (std::abs(y.data<float>()[i] - w.data<float>()[i]) > 0.5001f * h) ++far;
        }
        CHECK(far == 0);
      });
}

}  // namespace
}  // namespace omq::quant
