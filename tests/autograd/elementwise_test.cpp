// Every row of the scalar lists in tensor/elementwise.h: value against the C++ standard library,
// derivative against differences, and broadcasting. A new row without a reference here fails the
// first test.
#include "tensor/elementwise.h"

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/devices.h"
#include "tests/support/gradcheck.h"

namespace omq {
namespace {

constexpr double kA = -0.4, kB = 0.7;  // parameters of affine and clamp

// What a function is, where it may be evaluated, and the points that differences must keep away
// from.
struct Reference {
  std::function<double(double)> f;
  double lo = -3, hi = 3;
  std::vector<double> kinks = {};
};

const std::map<std::string, Reference>& references() {
  static const std::map<std::string, Reference> table = {
      {"affine", {[](double x) { return kA * x + kB; }}},
      {"exp", {[](double x) { return std::exp(x); }}},
      {"log", {[](double x) { return std::log(x); }, 0.1, 4}},
      {"sqrt", {[](double x) { return std::sqrt(x); }, 0.1, 4}},
      {"square", {[](double x) { return x * x; }}},
      {"abs", {[](double x) { return std::abs(x); }, -3, 3, {0}}},
      {"sigmoid", {[](double x) { return 1 / (1 + std::exp(-x)); }}},
      {"silu", {[](double x) { return x / (1 + std::exp(-x)); }}},
      {"clamp", {[](double x) { return std::min(std::max(x, kA), kB); }, -3, 3, {kA, kB}}},
      {"round",
       {[](double x) { return std::nearbyint(x); }, -3, 3, {-2.5, -1.5, -0.5, 0.5, 1.5, 2.5}}},
      {"round_ste", {[](double x) { return std::nearbyint(x); }}},
  };
  return table;
}

Tensor sample(const Reference& r, Shape shape, uint64_t seed) {
  Rng rng(seed);
  Tensor x = Tensor::empty(shape, DType::F64);
  for (int64_t i = 0; i < x.numel(); ++i) {
    double& v = x.data<double>()[i];
    bool near_kink;
    do {
      v = rng.uniform(r.lo, r.hi);
      near_kink = false;
      for (double k : r.kinks) near_kink = near_kink || std::abs(v - k) < 1e-3;
    } while (near_kink);
  }
  return x;
}

struct UnaryRow {
  std::string name;
  std::function<Tensor(const Tensor&)> op;
};

// affine and clamp take two parameters more.
std::vector<UnaryRow> unary_rows() {
  std::vector<UnaryRow> rows;
#define OMQ_ROW(op, functor)                                        \
  rows.push_back({#op, [](const auto& x) -> Tensor {                \
                    if constexpr (requires { omq::op(x, kA, kB); }) \
                      return omq::op(x, kA, kB);                    \
                    else                                            \
                      return omq::op(x);                            \
                  }});
  OMQ_UNARY_LIST(OMQ_ROW)
#undef OMQ_ROW
  return rows;
}

struct BinaryRow {
  std::string name;
  std::function<Tensor(const Tensor&, const Tensor&)> op;
};

std::vector<BinaryRow> binary_rows() {
  std::vector<BinaryRow> rows;
#define OMQ_ROW(op, functor) \
  rows.push_back({#op, [](const Tensor& a, const Tensor& b) { return omq::op(a, b); }});
  OMQ_BINARY_LIST(OMQ_ROW)
#undef OMQ_ROW
  return rows;
}

double binary_reference(const std::string& name, double a, double b) {
  if (name == "add") return a + b;
  if (name == "sub") return a - b;
  if (name == "mul") return a * b;
  if (name == "div") return a / b;
  if (name == "maximum") return std::max(a, b);
  FAIL("no reference for " << name);
  return 0;
}

}  // namespace

TEST_CASE("every scalar function has the value that the standard library gives") {
  for (const UnaryRow& row : unary_rows()) {
    CAPTURE(row.name);
    REQUIRE(references().contains(row.name));
    const Reference& r = references().at(row.name);
    const Tensor x = sample(r, {3, 50}, 1);
    Tensor want = empty_like(x);
    for (int64_t i = 0; i < x.numel(); ++i) want.data<double>()[i] = r.f(x.data<double>()[i]);
    CHECK(close(row.op(x), want, 1e-30));
    for (Device d : test_devices()) {
      CAPTURE(d);
      CHECK(close(row.op(converted(x, DType::F32, d)), want, 1e-13));
    }
  }
}

TEST_CASE("every scalar function has the derivative that differences give") {
  for (const UnaryRow& row : unary_rows()) {
    if (row.name == "round_ste") continue;  // by definition not what differences give: below
    CAPTURE(row.name);
    const Tensor x = sample(references().at(row.name), {4, 5}, 2);
    CHECK(gradcheck([&](const auto& in) { return row.op(in[0]); }, {x}));
    const Tensor narrow = converted(x, DType::F32), p = parameter(narrow), q = parameter(x);
    CHECK(close(backward(sum(row.op(p)))[p], backward(sum(row.op(q)))[q], 1e-12));
  }
}

TEST_CASE("derivatives at kinks are the chosen ones") {
  const auto slope = [](const TensorFunction& f, std::initializer_list<double> at) {
    const Tensor x = parameter(Tensor::from<double>(at, {static_cast<int64_t>(at.size())}));
    return backward(sum(f({x})))[x].to_vector<double>();
  };
  using V = std::vector<double>;
  CHECK(slope([](const auto& in) { return abs(in[0]); }, {-2, 0, 3}) == V{-1, 0, 1});
  CHECK(slope([](const auto& in) { return clamp(in[0], -1, 2); }, {-1.5, -1, 0, 2, 2.5}) ==
        V{0, 1, 1, 1, 0});
  CHECK(slope([](const auto& in) { return round(in[0]); }, {0.5, 1.2}) == V{0, 0});
  CHECK(slope([](const auto& in) { return round_ste(in[0]) * 3.0; }, {0.5, 1.2, -7.9}) ==
        V{3, 3, 3});
  const Tensor a = parameter(Tensor::from<double>({1, 2, 3}, {3})),
               b = parameter(Tensor::from<double>({2, 2, 2}, {3}));
  const Gradients g = backward(sum(maximum(a, b)));
  CHECK(g[a].to_vector<double>() == V{0, 0.5, 1});
  CHECK(g[b].to_vector<double>() == V{1, 0.5, 0});
}

TEST_CASE("every binary function broadcasts, with values and gradients") {
  struct Pair {
    Shape a, b;
  };
  const std::vector<Pair> pairs = {{{3, 4}, {3, 4}}, {{3, 4}, {4}},          {{4}, {3, 4}},
                                   {{3, 1}, {1, 4}}, {{2, 3, 4}, {3, 1}},    {{1}, {2, 3}},
                                   {{2, 3}, {1}},    {{2, 1, 3}, {2, 4, 1}}, {{1, 1}, {1}}};
  for (const BinaryRow& row : binary_rows())
    for (const Pair& p : pairs) {
      CAPTURE(row.name);
      CAPTURE(p.a);
      CAPTURE(p.b);
      Rng rng(4);
      const Tensor a = random_tensor(rng, p.a, DType::F64, -2, 2),
                   b = random_tensor(rng, p.b, DType::F64, 0.5, 2);
      CHECK(gradcheck([&](const auto& in) { return row.op(in[0], in[1]); }, {a, b}));
      CHECK(close(row.op(converted(a, DType::F32), converted(b, DType::F32)), row.op(a, b), 1e-12));
    }
}

TEST_CASE("every binary function has the right value") {
  Rng rng(8);
  const Tensor a = random_tensor(rng, {5, 6}, DType::F64, -2, 2),
               b = random_tensor(rng, {6}, DType::F64, 0.5, 2);
  for (const BinaryRow& row : binary_rows()) {
    CAPTURE(row.name);
    Tensor want = empty_like(a);
    for (int64_t i = 0; i < 30; ++i)
      want.data<double>()[i] =
          binary_reference(row.name, a.data<double>()[i], b.data<double>()[i % 6]);
    CHECK(bit_equal(row.op(a, b), want));
    for (Device d : test_devices())
      CHECK(close(row.op(converted(a, DType::F32, d), converted(b, DType::F32, d)), want, 1e-13));
  }
}

TEST_CASE("scalar functions and binary ones take any strides") {
  Rng rng(9);
  for (Device d : test_devices()) {
    CAPTURE(d);
    const Tensor x = random_tensor(rng, {40, 6, 50}, DType::F32);
    const Tensor xd = converted(x, DType::F32, d);
    const Tensor strided = slice(transpose(xd, 0, 2), 1, 1, 5),
                 plain = slice(transpose(x, 0, 2), 1, 1, 5);
    CHECK(close(exp(strided), exp(converted(plain, DType::F32)), 1e-13));
    const Tensor row = random_tensor(rng, {4, 1}, DType::F32);
    CHECK(close(strided * converted(row, DType::F32, d), converted(plain, DType::F32) * row, 0));
    CHECK(close(strided - strided, Tensor::zeros(strided.shape()), 0));
  }
}

TEST_CASE("operators are the functions they look like") {
  const Tensor a = Tensor::from<double>({1, -2}, {2}), b = Tensor::from<double>({4, 5}, {2});
  using V = std::vector<double>;
  CHECK((a + b).to_vector<double>() == V{5, 3});
  CHECK((a - b).to_vector<double>() == V{-3, -7});
  CHECK((a * b).to_vector<double>() == V{4, -10});
  CHECK((a / b).to_vector<double>() == V{0.25, -0.4});
  CHECK((a * 3.0).to_vector<double>() == V{3, -6});
  CHECK((3.0 * a).to_vector<double>() == V{3, -6});
  CHECK((a + 1.0).to_vector<double>() == V{2, -1});
  CHECK((a - 1.0).to_vector<double>() == V{0, -3});
  CHECK((a / 2.0).to_vector<double>() == V{0.5, -1});
  CHECK((-a).to_vector<double>() == V{-1, 2});
}

TEST_CASE("to() converts, and its gradient comes back in the first type") {
  const Tensor x = parameter(Tensor::from<float>({1.0f, 1.00390625f, -2.5f}, {3}));
  const Tensor y = to(x, DType::BF16);
  CHECK(y.dtype() == DType::BF16);
  CHECK(converted(y, DType::F32).to_vector<float>() == std::vector<float>{1.0f, 1.0f, -2.5f});
  const Gradients g = backward(sum(to(y, DType::F64) * 3.0));
  CHECK(g[x].dtype() == DType::F32);
  CHECK(g[x].to_vector<float>() == std::vector<float>{3, 3, 3});
  CHECK(to(x, DType::F32).storage() == x.storage());
  CHECK(to(x, Device{}).storage() == x.storage());
  for (Device d : test_devices()) {
    const Tensor there = to(x.detach(), d);
    CHECK(there.device() == d);
    CHECK(bit_equal(to(there, Device{}), x));
  }
}

}  // namespace omq
