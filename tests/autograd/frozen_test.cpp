// Straight-through gradients against central differences of the function with its roundings frozen:
// the check that differences of the real function cannot make.
#include "autograd/frozen.h"

#include <doctest/doctest.h>

#include <cmath>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq {
namespace {

using Function = std::function<Tensor(const std::vector<Tensor>&)>;

// f → one number, each element of its result weighed by another.
Tensor weighed(const Tensor& y) {
  Rng rng(4);
  return sum(y * converted(random_tensor(rng, y.shape()), y.dtype()));
}

// backward() of the real f in every element of every input, against differences of the frozen one.
void check_frozen(const Function& f, const std::vector<Tensor>& inputs) {
  std::vector<Tensor> leaves;
  for (const Tensor& x : inputs) leaves.push_back(parameter(x));
  FrozenRounding frozen;
  Tensor real;
  {
    const auto scope = frozen.record();
    real = weighed(f(leaves));
  }
  const Gradients g = backward(real);
  NoGrad off;
  {
    const auto scope = frozen.replay();  // the base point: the same value
    CHECK(weighed(f(inputs)).item<double>() == doctest::Approx(real.item<double>()).epsilon(1e-13));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    Tensor want = Tensor::zeros(inputs[i].shape(), DType::F64);
    for (int64_t at = 0; at < want.numel(); ++at) {
      std::vector<Tensor> moved = inputs;
      double value[2];
      for (const int side : {0, 1}) {
        moved[i] = converted(inputs[i], DType::F64);
        moved[i].data<double>()[at] += side ? 1e-5 : -1e-5;
        const auto scope = frozen.replay();
        value[side] = weighed(f(moved)).item<double>();
      }
      want.data<double>()[at] = (value[1] - value[0]) / 2e-5;
    }
    CAPTURE(i);
    CHECK(within(g[leaves[i]], want,
                 2e-8 * (1 + static_cast<double>(sum(abs(want)).item<double>()))));
  }
}

TEST_CASE("frozen rounding: zero points that learn, straight through their own rounding") {
  for_all(
      40, [](Rng& rng) { return rng; },
      [](Rng rng) {
        const GroupSpec s{.bits = static_cast<int>(rng.between(2, 4)),
                          .group_size = rng.between(0, 2) * 5,
                          .end_codes_learn = rng.coin(),
                          .zero_learns = true};
        const Shape grid{2, s.groups(12)};
        check_frozen(
            [s](const std::vector<Tensor>& in) {
              const Tensor z = straight_through(
                  in[2], clamp(round(in[2].detach()), 0, static_cast<double>(s.max_code())));
              return fake_quant(in[0], in[1], z, s);
            },
            {normal_tensor(rng, {2, 12}), random_tensor(rng, grid, DType::F64, 0.2, 0.8),
             random_tensor(rng, grid, DType::F64, -1, 1.2 * s.max_code())});
      });
}

TEST_CASE("frozen rounding: gradients of fake_quant are those of its frozen twin") {
  for_all(
      60, [](Rng& rng) { return rng; },
      [](Rng rng) {
        const GroupSpec s{.bits = static_cast<int>(rng.between(2, 5)),
                          .group_size = rng.between(0, 2) * 5,
                          .include_zero = rng.coin(),
                          .end_codes_learn = rng.coin()};
        const Tensor x = normal_tensor(rng, {2, 12});
        const Shape grid{2, s.groups(12)};
        CAPTURE(s.bits);
        CAPTURE(s.group_size);
        // The quantiser as quant/ builds it: clamped codes on both sides, a range that x itself
        // moves.
        check_frozen(
            [s](const std::vector<Tensor>& in) {
              const Range r = group_range(in[0], s);
              const Tensor hi = sigmoid(in[1]) * r.hi, lo = sigmoid(in[2]) * r.lo;
              const Tensor h = clamp((hi - lo) / static_cast<double>(s.max_code()), 1e-5, 1e4);
              return fake_quant(in[0], h, round(-lo.detach() / h.detach()), s);
            },
            {x, random_tensor(rng, grid, DType::F64, -1, 3),
             random_tensor(rng, grid, DType::F64, -1, 3)});
      });
}

TEST_CASE("frozen rounding: gradients of quantised rows, and of rounding itself") {
  for_all(
      40, [](Rng& rng) { return rng; },
      [](Rng rng) {
        const RowQuant s{.bits = static_cast<int>(rng.between(2, 5)),
                         .include_zero = rng.coin(),
                         .end_codes_learn = rng.coin()};
        const Tensor x = normal_tensor(rng, {2, 3, 7}), a = normal_tensor(rng, {1, 7});
        check_frozen(
            [s](const std::vector<Tensor>& in) { return fake_quant_rows(in[0] * in[1], s); },
            {x, a});
        check_frozen(
            [s](const std::vector<Tensor>& in) { return fake_quant_rows(in[0], s, in[1]); },
            {x, random_tensor(rng, {1}, DType::F64, 0.4, 1)});
        check_frozen([](const std::vector<Tensor>& in) { return square(round_ste(in[0] * 3.0)); },
                     {x});
      });
}

TEST_CASE("frozen rounding: F64 repeats what F32 decided") {
  Rng rng(2);
  const GroupSpec s{.bits = 3, .group_size = 8};
  Tensor x = normal_tensor(rng, {4, 20}), h = random_tensor(rng, {4, 3}, DType::F64, 0.2, 0.5);
  const Tensor z = round(random_tensor(rng, {4, 3}, DType::F64, 1, 6));
  // A weight on a tie: F32 and F64 would round it to different sides.
  h.data<double>()[0] = 0.25;
  x.data<double>()[0] = 0.375 - 1e-9;
  z.data<double>()[0] = 3;
  const auto narrow = [](const Tensor& t) { return converted(t, DType::F32); };
  FrozenRounding frozen;
  Tensor decided;
  {
    const auto scope = frozen.record();
    decided = fake_quant(narrow(x), narrow(h), narrow(z), s);
  }
  CHECK_FALSE(close(fake_quant(x, h, z, s), decided, 1e-10));
  const Tensor p = parameter(h);
  const auto scope = frozen.replay();
  const Tensor again = fake_quant(x, p, z, s);
  CHECK(close(again, decided, 1e-13));
  CHECK(backward(sum(again)).contains(p));
}

TEST_CASE("frozen rounding: a replay of other ops is an error") {
  const Tensor x = Tensor::zeros({2, 4}, DType::F64), y = Tensor::zeros({2, 5}, DType::F64);
  FrozenRounding frozen;
  {
    const auto scope = frozen.record();
    round_ste(x);
  }
  {
    const auto scope = frozen.replay();
    CHECK_THROWS_WITH_AS(round_ste(y),
                         "frozen rounding: rounding 1 of [2, 5] is not the recorded one", Error);
  }
  const auto scope = frozen.replay();
  round_ste(x);
  CHECK_THROWS_WITH_AS(fake_quant_rows(x, {}),
                       "frozen rounding: rounding 2 of [2, 4] is not the recorded one", Error);
  CHECK(FrozenRounding::current() == &frozen);
}

}  // namespace
}  // namespace omq
