// The reverse sweep itself: joins, reuse, what is kept and for how long, and how it says no.
#include "autograd/backward.h"

#include <doctest/doctest.h>

#include <memory>

#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq {
namespace {

Tensor leaf(std::initializer_list<double> v) {
  return parameter(Tensor::from<double>(v, {static_cast<int64_t>(v.size())}));
}

using V = std::vector<double>;

// An op whose closure holds `token`.
Tensor holding(const Tensor& x, const std::shared_ptr<int>& token) {
  return record("holding", x.detach(), {x}, [token](const Tensor& dy) -> Grads { return {dy}; });
}

}  // namespace

TEST_CASE("a tensor that is used twice gets both gradients") {
  const Tensor x = leaf({2, -3});
  CHECK(backward(sum(x * x))[x].to_vector<double>() == V{4, -6});
  const Tensor y = x * 3.0;  // y is shared, then its branches join again
  CHECK(backward(sum(y * y + y + x))[x].to_vector<double>() == V{18 * 2 + 3 + 1, 18 * -3 + 3 + 1});
  CHECK(backward(sum(x - x))[x].to_vector<double>() == V{0, 0});
}

TEST_CASE("a parameter that is itself the loss has gradient 1") {
  const Tensor x = leaf({5});
  CHECK(backward(x)[x].item<double>() == 1);
}

TEST_CASE("the sweep follows creation order across branches of different length") {
  const Tensor x = leaf({1.5});
  Tensor slow = x;
  for (int i = 0; i < 10; ++i) slow = slow * 2.0;
  const Tensor fast = x * 5.0;
  CHECK(backward(slow * fast)[x].item<double>() == doctest::Approx(2 * 1024 * 5 * 1.5));
}

TEST_CASE("constants and unused parameters get nothing") {
  const Tensor x = leaf({1, 2}), unused = leaf({3}), constant = Tensor::from<double>({4, 5}, {2});
  const Gradients g = backward(sum(x * constant));
  CHECK(g[x].to_vector<double>() == V{4, 5});
  CHECK_FALSE(g.contains(unused));
  CHECK_FALSE(g.contains(constant));
  CHECK_THROWS_WITH_AS(g[unused],
                       "gradient: the loss does not depend on this parameter of shape [1]", Error);
  CHECK_THROWS_AS(g[constant], Error);
}

TEST_CASE("gradients that arrive through views are row-major") {
  Rng rng(1);
  const Tensor w = parameter(random_tensor(rng, {4, 3})), x = random_tensor(rng, {5, 3});
  const Tensor g = backward(sum(square(linear(x, w))))[w];
  CHECK(g.is_contiguous());
  CHECK(g.shape() == w.shape());
}

TEST_CASE("history can be used once") {
  const Tensor x = leaf({2});
  const Tensor y = square(x), loss = y * 3.0, other = y + 1.0;
  backward(loss);
  CHECK_THROWS_WITH_AS(backward(loss), "backward: the history of 'affine' was already used", Error);
  CHECK_THROWS_WITH_AS(backward(other), "backward: the history of 'square' was already used",
                       Error);
  CHECK(backward(square(x))[x].item<double>() == 4);  // the parameter itself is as good as new
}

TEST_CASE("a loss must be one element with history") {
  const Tensor x = leaf({1, 2});
  CHECK_THROWS_WITH_AS(backward(x * 2.0), "backward: the loss has shape [2], not one element",
                       Error);
  CHECK_THROWS_WITH_AS(
      backward(Tensor::zeros({1})),
      "backward: the loss has no history (no parameter was used, or NoGrad was on)", Error);
  CHECK_THROWS_WITH_AS(parameter(Tensor::zeros({2}, DType::BF16)),
                       "parameter: learnables are F32 (or F64), got BF16", Error);
}

TEST_CASE("a closure that answers wrongly is found out") {
  const Tensor x = leaf({1, 2});
  const Tensor few = record("few", Tensor::zeros({1}, DType::F64), {x, x},
                            [](const Tensor& dy) -> Grads { return {dy}; });
  CHECK_THROWS_WITH_AS(backward(few), "backward: 'few' gave 1 gradients for 2 inputs", Error);
  const Tensor bent = record("bent", Tensor::zeros({1}, DType::F64), {x},
                             [](const Tensor& dy) -> Grads { return {dy}; });
  CHECK_THROWS_WITH_AS(backward(bent),
                       "backward: 'bent' gave a gradient of shape [1] for input 0 of shape [2]",
                       Error);
}

TEST_CASE("under NoGrad nothing is recorded, and scopes nest") {
  const Tensor x = leaf({2});
  {
    NoGrad off;
    CHECK_FALSE(needs_grad(x));
    CHECK(square(x).node() == nullptr);
    { NoGrad again; }
    CHECK(square(x).node() == nullptr);
  }
  CHECK(needs_grad(x));
  CHECK(square(x).node() != nullptr);
  CHECK(x.detach().node() == nullptr);
  CHECK(square(x.detach()).node() == nullptr);
}

TEST_CASE("gradients of micro-batches add up") {
  const Tensor x = leaf({1, 2}), y = leaf({3}), z = leaf({4});
  Gradients g = backward(sum(x * y));
  g.add(backward(sum(x * 10.0) * z));
  CHECK(g[x].to_vector<double>() == V{43, 43});
  CHECK(g[y].item<double>() == 3);
  CHECK(g[z].item<double>() == 30);
  const Gradients h = backward(sum(x));
  Gradients copy = h;
  copy.add(h);
  CHECK(copy[x].to_vector<double>() == V{2, 2});
  CHECK(h[x].to_vector<double>() == V{1, 1});  // a value: the source stays
}

TEST_CASE("gradients of a scaled loss are scaled back") {
  const Tensor x = parameter(Tensor::from<float>({1, -2, 3}, {3}));
  Gradients plain = backward(sum(square(x))), scaled = backward(sum(square(x)) * 1024);
  scaled.scale(1.0 / 1024);
  CHECK(bit_equal(scaled[x], plain[x]));
}

TEST_CASE("gradients may be read after their parameter is gone") {
  Gradients g;
  {
    const Tensor x = leaf({1, 2});
    g = backward(sum(x));
  }
  const Tensor other = leaf({1, 2});  // must not be taken for the one that died
  CHECK_FALSE(g.contains(other));
}

TEST_CASE("a closure is freed as soon as it ran, or with its tensor") {
  const auto token = std::make_shared<int>(1);
  const Tensor x = leaf({2});
  const Tensor y = holding(x, token);
  CHECK(token.use_count() == 2);
  const Tensor loss = sum(y);
  backward(loss);
  CHECK(token.use_count() == 1);  // though y and loss still live
  { const Tensor dropped = holding(x, token); }
  CHECK(token.use_count() == 1);
}

TEST_CASE("memory falls during backward and is all returned after it") {
  const size_t before = cpu_memory_use().now;
  {
    const Tensor x = parameter(Tensor::full({100'000}, 1.001));
    size_t with_history = 0;
    Gradients g;
    {
      Tensor y = x;
      for (int i = 0; i < 20; ++i) y = square(y);
      const Tensor loss = mean(y);
      with_history = cpu_memory_use().now - before;
      reset_cpu_memory_peak();
      g = backward(loss);
      // a sweep that kept everything would add twenty gradients
      CHECK(cpu_memory_use().peak - before < with_history + 4 * 400'064);
    }
    CHECK(with_history > 20 * 400'000);
    CHECK(cpu_memory_use().now - before < 3 * 400'064);  // x and its gradient
  }
  CHECK(cpu_memory_use().now == before);
}

TEST_CASE("constants are not kept for the gradient") {
  const Tensor w = Tensor::full({1000, 100}, 0.01), x = parameter(Tensor::full({1, 100}, 1));
  const std::weak_ptr<Storage> input = [&] {
    const Tensor input_tensor = Tensor::full({1, 100}, 2);
    const Tensor y = linear(input_tensor, w);  // no history: nothing may hold the input
    CHECK(y.node() == nullptr);
    return std::weak_ptr<Storage>(input_tensor.storage());
  }();
  CHECK(input.expired());
  const Tensor y = linear(x, w);
  CHECK(x.storage().use_count() == 1);  // the gradient of x needs w, not x
  CHECK(y.node() != nullptr);
}

TEST_CASE("a long chain of ops neither overflows backward nor its own release") {
  constexpr int kLength = 100'000;  // recursion would need some 20 MB of stack
  const auto chain = [](const Tensor& x) {
    Tensor y = x;
    for (int i = 0; i < kLength; ++i) y = y + 1.0;
    return y;
  };
  const Tensor x = leaf({1});
  CHECK(backward(chain(x))[x].item<double>() == 1);
  { const Tensor dropped = chain(x); }
  {  // wide and deep: every step joins two paths
    Tensor a = x;
    for (int i = 0; i < kLength; ++i) a = maximum(a, a);
  }
  CHECK(backward(square(x))[x].item<double>() == 2);
}

}  // namespace omq
