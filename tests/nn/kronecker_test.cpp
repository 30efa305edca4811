// Kronecker transforms of rows: against the whole matrix L ⊗ R, their gradients, and what a linear
// and an attention do with them.
#include "nn/kronecker.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "nn/attention.h"
#include "nn/linear.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/gradcheck.h"

namespace omq::nn {
namespace {

// L ⊗ R entry by entry, with identities where a factor is undefined. [n, n]
Tensor whole(const Kronecker& k, int64_t n) {
  const int64_t n2 = k.right.defined() ? k.right.dim(0) : n / k.left.dim(0);
  const auto entry = [](const Tensor& t, int64_t i, int64_t j) {
    return t.defined() ? t.data<double>()[i * t.dim(0) + j] : i == j ? 1.0 : 0.0;
  };
  Tensor m = Tensor::empty({n, n}, DType::F64);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      m.data<double>()[i * n + j] = entry(k.left, i / n2, j / n2) * entry(k.right, i % n2, j % n2);
  return m;
}

Kronecker random_factors(Rng& rng, int64_t left, int64_t right) {
  const auto factor = [&](int64_t n) { return n > 0 ? normal_tensor(rng, {n, n}) : Tensor{}; };
  const Tensor l = factor(left);
  return {l, factor(right)};
}

struct Sizes {
  int64_t left, right, n;
};
constexpr Sizes kSizes[] = {{3, 5, 15}, {5, 3, 15}, {0, 5, 15}, {3, 0, 15},
                            {1, 6, 6},  {6, 1, 6},  {0, 4, 4},  {4, 0, 4}};

}  // namespace

TEST_CASE("kronecker: rows are multiplied by the whole matrix") {
  Rng rng(1);
  for (const Sizes& s : kSizes) {
    CAPTURE(s.left);
    CAPTURE(s.right);
    const Kronecker k = random_factors(rng, s.left, s.right);
    const Tensor x = normal_tensor(rng, {2, 3, s.n}), flat = reshape(x, {6, s.n});
    const Tensor want = reshape(matmul(flat, whole(k, s.n)), {2, 3, s.n});
    CHECK(close(k(x), want, 1e-28));
    CHECK(close(k(transpose(contiguous(transpose(x, 0, 1)), 0, 1)), want, 1e-28));
    CHECK(close(k(reshape(slice(flat, 0, 4, 5), {s.n})),
                reshape(slice(reshape(want, {6, s.n}), 0, 4, 5), {s.n}), 1e-28));
    for (const Device d : test_devices()) {
      CAPTURE(d);
      const auto there = [d](const Tensor& t) {
        return t.defined() ? converted(t, DType::F32, d) : Tensor{};
      };
      CHECK(close(Kronecker{there(k.left), there(k.right)}(there(x)), want, 1e-11));
    }
    const Tensor narrow = converted(x, DType::BF16),
                 out = k(narrow);  // as a GPU's products leave it
    CHECK(out.dtype() == DType::BF16);
    CHECK(close(out, k(converted(narrow, DType::F64)), 1e-5));
    CHECK(k.operations(s.n) == 2 * s.n * (s.left + s.right));
  }
}

TEST_CASE("kronecker: gradients in rows and factors") {
  Rng rng(2);
  for (const Sizes& s : kSizes) {
    CAPTURE(s.left);
    CAPTURE(s.right);
    const Kronecker k = random_factors(rng, s.left, s.right);
    std::vector<Tensor> in{normal_tensor(rng, {2, s.n})};
    for (const Tensor& f : {k.left, k.right})
      if (f.defined()) in.push_back(f);
    CHECK(gradcheck(
        [&](const auto& v) {
          Kronecker with;
          if (s.left > 0) with.left = v[1];
          if (s.right > 0) with.right = v.back();
          return with(v[0]);
        },
        in));
  }
}

TEST_CASE("kronecker: sizes that do not fit are refused") {
  Rng rng(3);
  const Kronecker both = random_factors(rng, 3, 5);
  CHECK(Kronecker::sizes_fit(3, 5, 15));
  CHECK_FALSE(Kronecker::sizes_fit(3, 5, 30));
  CHECK(Kronecker::sizes_fit(3, 0, 30));
  CHECK_FALSE(Kronecker::sizes_fit(0, 3, 31));
  CHECK_FALSE(Kronecker::sizes_fit(0, 0, 4));
  CHECK_THROWS_WITH_AS(both(Tensor::zeros({2, 14}, DType::F64)),
                       "kronecker: factors of 3 and 5 (0: none) for rows of 14", Error);
  CHECK_THROWS_WITH_AS(Kronecker{}(Tensor::zeros({2, 14}, DType::F64)),
                       "kronecker: factors of 0 and 0 (0: none) for rows of 14", Error);
}

TEST_CASE("linear: the input is transformed before it is seen and quantised") {
  Rng rng(4);
  const Kronecker exact = random_factors(rng, 4, 6);
  const Kronecker k{converted(exact.left, DType::F32), converted(exact.right, DType::F32)};
  const Tensor x = normal_tensor(rng, {3, 24}, DType::F32);
  Linear plain{normal_tensor(rng, {20, 24}, DType::F32), normal_tensor(rng, {20}, DType::F32)};
  plain.input_quant = RowQuant{.bits = 5};
  Linear layer = plain;
  layer.online = k;
  Tensor seen;
  layer.pre = [&](const Tensor& in) { return seen = in; };
  const Tensor y = layer(x);
  CHECK(bit_equal(seen, k(x)));
  CHECK(bit_equal(y, plain(k(x))));
  CHECK(bit_equal(layer.product()(k(x)), y));
  CHECK_FALSE(bit_equal(y, plain(x)));
  std::vector<std::string> names;
  layer.visit([&](std::string_view name, Tensor&) { names.emplace_back(name); });
  CHECK(names == std::vector<std::string>{"weight", "bias", "online.left", "online.right"});
}

TEST_CASE("linear input: transformed once for all that share the factors") {
  Rng rng(6);
  const Kronecker exact = random_factors(rng, 2, 3);
  const Kronecker k{converted(exact.left, DType::F32), converted(exact.right, DType::F32)};
  const Kronecker other{k.left, converted(exact.right, DType::F32)};
  CHECK(k.same_as(k));
  CHECK_FALSE(k.same_as(other));
  CHECK_FALSE(k.same_as({k.left, {}}));
  const LinearInput x(normal_tensor(rng, {4, 6}, DType::F32));
  const LinearInput* first = &x.transformed(k);
  CHECK(first == &x.transformed(k));
  CHECK(bit_equal(first->tensor(), k(x.tensor())));
  const RowQuant s{.bits = 4};
  CHECK(x.transformed(k).simulated(s).raw() == x.transformed(k).simulated(s).raw());
  const void* before = first->tensor().raw();
  CHECK(x.transformed(other).tensor().raw() != before);
}

TEST_CASE("attention: heads are transformed behind the rotary positions, before their grid") {
  Rng rng(5);
  const auto linear = [&](int64_t out, int64_t in) {
    return Linear{normal_tensor(rng, {out, in}, DType::F32, 0.2), {}};
  };
  Attention a{.q_proj = linear(32, 24),
              .k_proj = linear(16, 24),
              .v_proj = linear(16, 24),
              .o_proj = linear(24, 32),
              .q_norm = {},
              .k_norm = {},
              .heads = 4,
              .kv_heads = 2,
              .head_dim = 8,
              .taps = {}};
  const Tensor x = normal_tensor(rng, {2, 7, 24}, DType::F32);
  const Positions at = positions(0, 7, rope_tables(rope_frequencies(8, 1e4, {}), 7));
  const NoGrad off;
  const Tensor y = a(x, at, nullptr);
  // A permutation of channels: an orthogonal matrix that no rounding blurs.
  Tensor turn = Tensor::zeros({8, 8});
  for (int64_t i = 0; i < 8; ++i) turn.data<float>()[i * 8 + (i * 3 + 1) % 8] = 1;
  a.taps.q_online = Kronecker{{}, turn};
  CHECK_FALSE(close(a(x, at, nullptr), y, 1e-3));
  a.taps.k_online = Kronecker{{}, turn};
  CHECK(close(a(x, at, nullptr), y, 1e-12));
  // A row's grid does not depend on the order of its entries, so the caches agree too.
  a.taps.q = a.taps.k = RowQuant{.bits = 4};
  const Tensor quantised = a(x, at, nullptr);
  Attention plain = a;
  plain.taps.q_online = plain.taps.k_online = {};
  CHECK(close(quantised, plain(x, at, nullptr), 1e-10));
  KVCache cache(2, 7, 2, 8, {}, {a.taps.k, {}});
  CHECK(close(a(x, at, &cache), quantised, 1e-10));
}

}  // namespace omq::nn
