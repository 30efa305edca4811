// AdamW: one step by hand, ten steps against torch.optim.AdamW (tests/golden/adamw.safetensors),
// and its manners.
#include "nn/adamw.h"

#include <doctest/doctest.h>

#include <cmath>
#include <fstream>

#include "autograd/ops.h"
#include "tensor/step_graph.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/golden.h"
#include "tests/support/property.h"

namespace omq::nn {
namespace {

Tensor leaf(std::initializer_list<float> v, Device d = {}) {
  return parameter(Tensor::from<float>(v, {static_cast<int64_t>(v.size())}, d));
}

}  // namespace

TEST_CASE("one step is the formula") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    const Tensor p = leaf({1, -2, 0.5f}, d), weights = Tensor::from<float>({3, -4, 0}, {3}, d);
    AdamW opt({{"group", {p}, 0.1, 0.01}}, {.beta1 = 0.9, .beta2 = 0.99, .eps = 1e-3});
    opt.step(backward(sum(p * weights)));
    // with corrected moments m̂ = g and v̂ = g²: p ← p (1 − lr·wd) − lr · g / (|g| + eps)
    const double g[] = {3, -4, 0}, start[] = {1, -2, 0.5};
    for (size_t i = 0; i < 3; ++i)
      CHECK(values(p)[i] ==
            doctest::Approx(start[i] * (1 - 0.1 * 0.01) - 0.1 * g[i] / (std::abs(g[i]) + 1e-3))
                .epsilon(1e-6));
    CHECK(opt.steps() == 1);
  }
}

TEST_CASE("ten steps agree with PyTorch") {
  const auto golden = load_golden("adamw");
  if (!golden) {
    MESSAGE("skipped: no tests/golden/adamw.safetensors");
    return;
  }
  for (Device d : test_devices())
    for (DType dtype : {DType::F32, DType::F64})
      for (const std::string name : {"wd0", "wd01"}) {
        if (dtype == DType::F64 && d.type != DeviceType::CPU) continue;
        CAPTURE(d);
        CAPTURE(name);
        CAPTURE(dtype_name(dtype));
        const auto read = [&](const std::string& key) {
          return converted(golden->at(key), dtype, d);
        };
        const Tensor path = converted(golden->at(name + ".param"), DType::F64),
                     curvature = read("curvature");
        const Tensor target = read("target"),
                     grads = converted(golden->at(name + ".grad"), DType::F64);
        const Tensor losses = converted(golden->at(name + ".loss"), DType::F64);
        const Tensor p = parameter(converted(slice(path, 0, 0, 1), dtype, d));  // [1, 8]
        AdamW opt({{"all", {p}, 1e-2, name == "wd01" ? 0.1 : 0.0}});
        for (int64_t step = 0; step < 10; ++step) {
          CAPTURE(step);
          const Tensor loss = sum(curvature * square(p - target)) * 0.5;
          CHECK(values(loss)[0] == doctest::Approx(losses.data<double>()[step]).epsilon(1e-5));
          const Gradients g = backward(loss);
          CHECK(within(g[p], slice(grads, 0, step, step + 1), 2e-5));
          opt.step(g);
          CHECK(within(p, slice(path, 0, step + 1, step + 2), dtype == DType::F64 ? 3e-7 : 2e-6));
        }
      }
}

TEST_CASE("a loss that is no number stops the optimiser for good") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    const Tensor p = leaf({1, 2}, d);
    AdamW opt({{"group", {p}, 0.1}});
    const auto step = [&](float loss) {
      opt.step(backward(sum(square(p))), Tensor::from<float>({loss}, {1}, d));
      return values(p);
    };
    const auto first = step(1);
    CHECK(first[0] == doctest::Approx(0.9));
    CHECK(step(std::nanf("")) == first);
    CHECK(step(1) == first);
    CHECK(opt.steps() == 1);
  }
}

TEST_CASE("every group has its own rate, which can be scaled") {
  const Tensor a = leaf({0}), b = leaf({0});
  AdamW opt({{"slow", {a}, 0.01}, {"fast", {b}, 0.1}});
  opt.step(backward(sum(a + b)));
  CHECK(a.item<float>() == doctest::Approx(-0.01));
  CHECK(b.item<float>() == doctest::Approx(-0.1));
  opt.scale_lr(0.5);
  opt.step(backward(sum(a + b)));
  CHECK(b.item<float>() == doctest::Approx(-0.15));
  opt.set_lr_factor(0);
  opt.step(backward(sum(a + b)));
  CHECK(b.item<float>() == doctest::Approx(-0.15));
  CHECK(opt.groups()[1].name == "fast");
}

TEST_CASE("a rate that falls along a cosine or a line, by the clock on the device") {
  for (Device d : test_devices())
    for (const RateShape shape : {RateShape::Cosine, RateShape::Linear}) {
      CAPTURE(d);
      const Tensor p = leaf({0}, d);
      // Signs of gradients: each step moves by its rate.
      AdamW opt({{"all", {p}, 0.1}},
                sign_descent({.shape = shape, .steps = 5, .done = 1, .last = 0.2}));
      double want = 0;
      for (int t = 1; t <= 6; ++t) {
        opt.step(backward(sum(p * 3.0)));
        const double at = std::min(1.0, (1 + t - 1) / 5.0);  // one step was done before
        want -= 0.1 * (shape == RateShape::Linear
                           ? 1 - 0.8 * at
                           : 0.2 + 0.8 * (1 + std::cos(at * 3.14159265358979)) / 2);
        CHECK(values(p)[0] == doctest::Approx(want).epsilon(1e-5));
      }
    }
}

TEST_CASE("a recorded step takes the rate of the moment") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    const Tensor p = leaf({0}, d);
    AdamW opt({{"all", {p}, 1}}, sign_descent({.shape = RateShape::Linear, .steps = 4}));
    {
      StepGraph graph(d, [&] { opt.step(backward(sum(p * -2.0))); });
      for (int i = 0; i < 4; ++i) graph.run();
    }
    CHECK(values(p)[0] == doctest::Approx(1 + 0.75 + 0.5 + 0.25));
  }
}

TEST_CASE("descent by signs: the size of a gradient is of no account, nothing moves without one") {
  const Tensor p = leaf({0, 0, 0, 0});
  AdamW opt({{"all", {p}, 0.25}}, sign_descent({}));
  opt.step(backward(sum(p * Tensor::from<float>({1e-9f, -1e9f, 0, 3}, {4}))));
  const auto v = values(p);
  CHECK(v[0] == doctest::Approx(-0.25));
  CHECK(v[1] == doctest::Approx(0.25));
  CHECK(v[2] == 0);
  CHECK(v[3] == doctest::Approx(-0.25));
}

TEST_CASE("a parameter that the loss does not touch stays as it is") {
  const Tensor a = leaf({1}), b = leaf({1});
  AdamW opt({{"all", {a, b}, 0.1, 0.5}});
  opt.step(backward(sum(a)));
  CHECK(b.item<float>() == 1.0f);
  CHECK(a.item<float>() < 1.0f);
}

TEST_CASE("a gradient that came through a view moves the right elements") {
  const Tensor w = parameter(Tensor::zeros({2, 3})), x = Tensor::from<float>({1, 0, -1}, {1, 3});
  const Tensor pick = Tensor::from<float>({1, 0}, {1, 2});
  AdamW opt({{"all", {w}, 0.1}});
  opt.step(backward(sum(linear(x, w) * pick)));  // only the first row of w counts
  CHECK(within(w, Tensor::from<float>({-0.1f, 0, 0.1f, 0, 0, 0}, {2, 3}), 1e-6));
}

TEST_CASE("training a small regression reaches its solution") {
  Rng rng(1);
  const Tensor x = normal_tensor(rng, {64, 5}, DType::F32),
               truth = normal_tensor(rng, {2, 5}, DType::F32);
  const Tensor y = linear(x, truth), w = parameter(Tensor::zeros({2, 5})),
               b = parameter(Tensor::full({2}, 1));
  AdamW opt({{"all", {w, b}, 0.05}});
  for (int step = 0; step < 400; ++step) opt.step(backward(mse(linear(x, w, b), y)));
  CHECK(close(w, truth, 1e-5));
}

TEST_CASE("parameters that cannot be written in place are refused") {
  const std::string file = std::filesystem::temp_directory_path() / "omq-adamw-test";
  std::ofstream(file, std::ios::binary) << std::string(64, '\0');
  const Tensor mapped = Tensor::view(Storage::map(file, 0, 64), 0, {16}, DType::F32);
  std::filesystem::remove(file);
  CHECK_THROWS_WITH_AS(
      AdamW({{"lwc", {parameter(mapped)}, 0.1}}),
      doctest::Contains(
          "adamw: a parameter of shape [16] in group 'lwc' cannot be written in place"),
      Error);
  CHECK_THROWS_AS(AdamW({{"view", {parameter(transpose(Tensor::zeros({2, 3}), 0, 1))}, 0.1}}),
                  Error);
}

}  // namespace omq::nn
