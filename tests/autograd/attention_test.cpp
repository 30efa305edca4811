// Attention in F32 against F64 around the borders of its tiles, and against the composed
// definition.
//
// Bound: NMSE 1e-12 for y and 1e-11 for gradients, sums of up to 300 terms in F32 (relative error
// near 1e-6, squared).
#include <doctest/doctest.h>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq {
namespace {

struct Case {
  int64_t B, T, S, H, K, d;
  bool causal = true;
};

struct Outcome {
  Tensor y, dq, dk, dv;
};

template <class F> Outcome run(const Case& c, F&& f, DType dtype, Device device) {
  Rng rng(static_cast<uint64_t>(c.T * 1000 + c.S));
  const auto input = [&](Shape shape) {
    return parameter(converted(normal_tensor(rng, shape), dtype, device));
  };
  const Tensor q = input({c.B, c.T, c.H, c.d}), k = input({c.B, c.S, c.K, c.d}),
               v = input({c.B, c.S, c.K, c.d});
  const Tensor dy = converted(normal_tensor(rng, q.shape()), dtype, device);
  const Tensor y = f(
      q, k, v, AttentionSpec{.scale = 1 / std::sqrt(static_cast<double>(c.d)), .causal = c.causal});
  const Gradients g = backward(sum(y * dy));
  return {y, g[q], g[k], g[v]};
}

// With one key the scores do not matter: their gradients are zero but for rounding.
Closeness same_gradient(const Tensor& got, const Tensor& want, double bound) {
  const Closeness zero = within(want, Tensor::zeros(want.shape(), want.dtype()), 1e-5);
  return zero ? within(got, want, 1e-5) : close(got, want, 10 * bound);
}

void check_same(const Outcome& got, const Outcome& want, double bound) {
  CHECK(close(got.y, want.y, bound));
  CHECK(same_gradient(got.dq, want.dq, bound));
  CHECK(same_gradient(got.dk, want.dk, bound));
  CHECK(close(got.dv, want.dv, 10 * bound));
}

}  // namespace

TEST_CASE("attention in F32 agrees with F64 around the borders of tiles") {
  const std::vector<Case> cases = {
      {1, 1, 1, 2, 1, 8},         {1, 7, 7, 2, 2, 8},      {2, 8, 8, 4, 2, 8},
      {1, 9, 9, 3, 1, 5},         {1, 127, 127, 2, 1, 8},  {1, 128, 128, 2, 1, 8},
      {1, 129, 129, 2, 1, 8},     {1, 300, 300, 2, 1, 16}, {1, 520, 520, 2, 1, 8},
      {1, 130, 300, 16, 4, 8},    {1, 1, 40, 6, 2, 16},    {2, 7, 20, 2, 1, 8},
      {1, 8, 135, 2, 1, 8},       {1, 130, 300, 4, 2, 8},  {1, 129, 129, 2, 1, 8, false},
      {1, 5, 70, 2, 2, 8, false},
  };
  for (Device d : test_devices())
    for (const Case& c : cases) {
      CAPTURE(d);
      CAPTURE(c.B);
      CAPTURE(c.T);
      CAPTURE(c.S);
      CAPTURE(c.causal);
      check_same(run(c, attention, DType::F32, d), run(c, attention, DType::F64, {}), 1e-12);
    }
}

TEST_CASE("attention equals its composition") {
  const auto composed = [](const Tensor& q, const Tensor& k, const Tensor& v, AttentionSpec s) {
    return attention_composed(q, k, v, s);
  };
  for (const Case& c :
       {Case{2, 12, 12, 4, 2, 6}, Case{1, 5, 17, 6, 2, 4}, Case{1, 6, 6, 2, 1, 4, false}}) {
    CAPTURE(c.T);
    check_same(run(c, attention, DType::F64, {}), run(c, composed, DType::F64, {}), 1e-27);
    check_same(run(c, attention, DType::F32, {}), run(c, composed, DType::F32, {}), 1e-12);
  }
}

TEST_CASE("a query does not see later keys") {
  Rng rng(3);
  const Tensor q = normal_tensor(rng, {1, 20, 2, 8}, DType::F32),
               k = normal_tensor(rng, {1, 20, 1, 8}, DType::F32);
  const Tensor v = normal_tensor(rng, k.shape(), DType::F32);
  const Tensor before = attention(q, k, v, {});
  Tensor late_k = converted(k, DType::F32), late_v = converted(v, DType::F32);
  for (int64_t i = 12 * 8; i < 20 * 8; ++i)
    late_k.data<float>()[i] = 1e6f, late_v.data<float>()[i] = -1e6f;
  const Tensor after = attention(q, late_k, late_v, {});
  CHECK(bit_equal(slice(after, 1, 0, 12), slice(before, 1, 0, 12)));
  CHECK_FALSE(bit_equal(slice(after, 1, 12, 20), slice(before, 1, 12, 20)));
}

TEST_CASE("large scores neither overflow nor lose their sum") {
  Rng rng(4);
  const Tensor q = normal_tensor(rng, {1, 9, 1, 4}, DType::F32, 100),
               k = normal_tensor(rng, {1, 9, 1, 4}, DType::F32, 100);
  const Tensor ones = Tensor::full({1, 9, 1, 4}, 1.0);
  CHECK(close(attention(q, k, ones, {}), ones, 1e-13));  // weights add up to 1
}

TEST_CASE("attention refuses shapes that do not fit") {
  const auto t = [](Shape s) { return Tensor::zeros(s); };
  const AttentionSpec spec;
  CHECK_THROWS_WITH_AS(attention(t({1, 2, 3, 4}), t({1, 2, 3, 4}), t({1, 2, 3, 5}), spec),
                       "attention: q [1, 2, 3, 4], k [1, 2, 3, 4], v [1, 2, 3, 5]", Error);
  CHECK_THROWS_WITH_AS(attention(t({1, 2, 3, 4}), t({1, 2, 2, 4}), t({1, 2, 2, 4}), spec),
                       "attention: q [1, 2, 3, 4] against k [1, 2, 2, 4]: batch, head size or head "
                       "counts do not fit",
                       Error);
  CHECK_THROWS_WITH_AS(attention(t({1, 5, 2, 4}), t({1, 4, 2, 4}), t({1, 4, 2, 4}), spec),
                       "attention: 5 queries for 4 keys", Error);
  const Tensor wide = Tensor::zeros({1, 2, 2, 4}, DType::F64);
  CHECK_THROWS_WITH_AS(attention(t({1, 2, 2, 4}), wide, wide, spec),
                       "attention: dtypes differ: F32, F64 and F64", Error);
}

}  // namespace omq
