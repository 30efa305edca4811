// Grids that learn by themselves: where they start, what they are at use, and their gradients
// against the closed forms (spec weight-methods §1, §10, §13). Differences with frozen roundings:
// tests/quant/audit_test.cpp.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "quant/clip.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq::quant {
namespace {

void fill(const Tensor& p, std::initializer_list<double> v) {
  Tensor t = p.detach();
  on(t).copy(t, Tensor::from<double>(std::vector<double>(v), p.shape()));
}

TEST_CASE("free grid: it starts as min-max, with the zero point not rounded yet") {
  Rng rng(1);
  const GroupSpec spec{.bits = 3, .group_size = 32};
  const Tensor w = normal_tensor(rng, {5, 72}, DType::F32);
  const auto free = free_grid(w, spec), plain = minmax_clip(w, spec);
  CHECK(bit_equal(free->grid(w).scale, plain->grid(w).scale));
  CHECK(bit_equal(free->grid(w).zero, plain->grid(w).zero));
  const nn::ParamGroup p = free->params();
  CHECK(p.name == "grid");
  CHECK(p.names == std::vector<std::string>{"step", "zero_point"});
  CHECK(p.params[1].shape() == Shape{5, 3});
  const auto range = group_range(w, spec);
  CHECK(within(p.params[1] * p.params[0], -range.lo, 1e-6));
  // It does not follow w: the range is of no account any more.
  CHECK(bit_equal(free->grid(w * 3.0).scale, plain->grid(w).scale));
}

TEST_CASE("free grid: at use zero points are codes and scales positive, whatever was learned") {
  const GroupSpec spec{.bits = 2, .group_size = 2};
  const Tensor w = Tensor::from<float>({-1, 1, -1, 1, -1, 1, -1, 1}, {1, 8});
  const auto clip = free_grid(w, spec);
  const auto p = clip->params().params;
  fill(p[0], {-3, 0.5, 1e9, 0});
  fill(p[1], {-7, 1.5, 2.5, 9});
  const Grid g = clip->grid(w);
  CHECK(g.scale.to_vector<float>() == std::vector<float>{1e-5f, 0.5f, 1e4f, 1e-5f});
  CHECK(g.zero.to_vector<float>() == std::vector<float>{0, 2, 2, 3});
  const Gradients d = backward(sum(g.scale * 2.0) + sum(g.zero * 5.0));  // straight through
  CHECK(d[p[0]].to_vector<float>() == std::vector<float>(4, 2));
  CHECK(d[p[1]].to_vector<float>() == std::vector<float>(4, 5));
}

TEST_CASE("free grid: the gradients are the table's") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    for_all(
        20, [](Rng& rng) { return rng; },
        [d](Rng rng) {
          const GroupSpec spec{.bits = static_cast<int>(rng.between(2, 4)),
                               .group_size = rng.between(0, 2) * 16};
          const int64_t rows = rng.between(1, 4), cols = rng.between(5, 50);
          const int64_t groups = spec.groups(cols), width = spec.group_cols(cols);
          const Tensor source = normal_tensor(rng, {rows, cols}, DType::F32),
                       up = normal_tensor(rng, {rows, cols}, DType::F32);
          const Tensor w = parameter(to(source, d));
          const auto clip = free_grid(w, spec);
          const auto p = clip->params().params;
          for (const Tensor& t : p) {  // a smaller step and another zero point, so that codes clamp
            Tensor data = t.detach();
            on(data).copy(data, t.detach() * 0.6);
          }
          const Grid g = clip->grid(w);
          const Gradients got = backward(sum(clip->on_grid(w, g, spec) * to(up, d)));
          const std::vector<double> x = values(source), u = values(up), h = values(g.scale),
                                    z = values(g.zero);
          std::vector<double> dw(x.size()), ds(h.size()), dz(h.size());
          const double top = spec.max_code();
          bool below = false, above = false;
          for (size_t i = 0; i < x.size(); ++i) {
            const auto at = static_cast<int64_t>(i);
            const auto k = static_cast<size_t>(at / cols * groups + at % cols / width);
            const double q = std::nearbyint(x[i] / h[k]) + z[k];
            below = below || q < 0;
            above = above || q > top;
            if (q < 0)
              ds[k] -= u[i] * z[k], dz[k] -= u[i] * h[k];
            else if (q > top)
              ds[k] += u[i] * (top - z[k]), dz[k] -= u[i] * h[k];
            else
              ds[k] += u[i] * (q - z[k] - x[i] / h[k]), dw[i] = u[i];
          }
          CHECK((below || above || cols < 20));
          const auto same = [](const Tensor& a, const std::vector<double>& b) {
            return within(a, Tensor::from<double>(b, a.shape()), 2e-4);
          };
          CHECK(same(got[w], dw));
          CHECK(same(got[p[0]], ds));
          CHECK(same(got[p[1]], dz));
        });
  }
}

TEST_CASE("free grid: symmetric learns the scale alone") {
  Rng rng(2);
  const GroupSpec spec{.bits = 4, .group_size = 16, .symmetric = true};
  const Tensor w = normal_tensor(rng, {3, 32}, DType::F32);
  const auto clip = free_grid(w, spec);
  CHECK(clip->params().names == std::vector<std::string>{"step"});
  const Grid g = clip->grid(w);
  CHECK(bit_equal(g.scale, minmax_clip(w, spec)->grid(w).scale));
  CHECK(g.zero.to_vector<float>() == std::vector<float>(6, 8));
  const Gradients d = backward(sum(square(clip->on_grid(w, g, spec))));
  CHECK(d.contains(clip->params().params[0]));
}

TEST_CASE("scaled range: shares of both ends, kept in [0, 1], on f16 scales") {
  Rng rng(3);
  const GroupSpec spec{.bits = 4, .group_size = 16};
  const Tensor w = normal_tensor(rng, {2, 32}, DType::F32);
  const auto clip = scaled_range(w, spec);
  const nn::ParamGroup p = clip->params();
  CHECK(p.name == "range");
  const Grid whole = minmax_clip(w, spec)->grid(w), start = clip->grid(w);
  CHECK(bit_equal(start.scale, to(to(whole.scale, DType::F16), DType::F32)));
  CHECK(bit_equal(start.zero, whole.zero));
  fill(p.params[0], {0.5, 1.5, -1, 1});
  fill(p.params[1], {1, 1, 0.5, -2});
  const Range r = group_range(w, spec);
  const std::vector<double> hi = values(r.hi), lo = values(r.lo), h = values(clip->grid(w).scale),
                            z = values(clip->grid(w).zero);
  const double a[] = {0.5, 1, 0, 1}, b[] = {1, 1, 0.5, 0};
  for (size_t i = 0; i < 4; ++i) {
    const double want = (a[i] * hi[i] - b[i] * lo[i]) / 15;
    CHECK(h[i] == doctest::Approx(want).epsilon(1e-3));
    CHECK(z[i] == std::clamp(std::nearbyint(-b[i] * lo[i] / want), 0.0, 15.0));
  }
  // ∂/∂a through h = … and z = −b·lo/h, both straight through: for a sum over ŵ of one group
  // dŵ/dh = (q − z) − in·w/h and dŵ/dz = −h outside.
  fill(p.params[0], {0.6, 0.6, 0.6, 0.6});
  fill(p.params[1], {0.7, 0.7, 0.7, 0.7});
  const Grid g = clip->grid(w);
  const Gradients got = backward(sum(clip->on_grid(w, g, spec)));
  const std::vector<double> x = values(w), gh = values(g.scale), gz = values(g.zero);
  for (size_t k = 0; k < 4; ++k) {
    double S = 0, Z = 0;
    for (size_t j = 0; j < 16; ++j) {
      const double v = x[k * 16 + j], q = std::nearbyint(v / gh[k]) + gz[k];
      const double c = std::clamp(q, 0.0, 15.0);
      S += c - gz[k] - (c == q ? v / gh[k] : 0);
      Z += c == q ? 0 : -gh[k];
    }
    const double exact = (0.6 * hi[k] - 0.7 * lo[k]) / 15;  // h before f16
    const double dh = S + Z * 0.7 * lo[k] / (exact * exact);
    CHECK(values(got[p.params[0]])[k] == doctest::Approx(dh * hi[k] / 15).epsilon(2e-3));
    CHECK(values(got[p.params[1]])[k] ==
          doctest::Approx(-dh * lo[k] / 15 - Z * lo[k] / exact).epsilon(2e-3));
  }
}

}  // namespace
}  // namespace omq::quant
