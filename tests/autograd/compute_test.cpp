// Products under a ComputeScope: operands rounded to 16 bits, sums and results in F32.
#include "autograd/compute.h"

#include <doctest/doctest.h>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq {
namespace {

Tensor rounded_twin(const Tensor& x, DType type) { return to(to(x.detach(), type), DType::F32); }

struct Product {
  Tensor y, da, db;
};
template <class F> Product product(F op, const Tensor& a, const Tensor& b, const Tensor& dy) {
  const Tensor pa = parameter(a), pb = parameter(b), y = op(pa, pb);
  const Gradients g = backward(sum(y * dy));
  return {y.detach(), g[pa], g[pb]};
}

const auto kLinear = [](const Tensor& a, const Tensor& b) { return linear(a, b); };
const auto kMatmul = [](const Tensor& a, const Tensor& b) { return matmul(a, b); };

template <class F>
void check_rounding(F op, const Tensor& a, const Tensor& b, const Tensor& dy, Compute c, DType t) {
  const Product want = product(op, rounded_twin(a, t), rounded_twin(b, t), dy);
  // The gradient of the output is rounded as well.
  const Product back = product(op, rounded_twin(a, t), rounded_twin(b, t), rounded_twin(dy, t));
  const Product got = [&] {
    const ComputeScope scope(c);
    return product(op, a, b, dy);
  }();
  CHECK(got.y.dtype() == DType::F32);
  CHECK(close(got.y, want.y, 1e-12));
  CHECK(close(got.da, back.da, 1e-12));
  CHECK(close(got.db, back.db, 1e-12));
  CHECK(!bit_equal(got.y, product(op, a, b, dy).y));  // it did round
}

}  // namespace

TEST_CASE("16-bit compute rounds the operands of products and nothing else") {
  for (Device d : test_devices())
    for (const auto& [c, t] : {std::pair{Compute::BF16, DType::BF16}, {Compute::F16, DType::F16}}) {
      CAPTURE(d);
      CAPTURE(dtype_name(t));
      Rng rng(7);
      auto random = [&](const Shape& s) { return converted(normal_tensor(rng, s), DType::F32, d); };
      check_rounding(kLinear, random({3, 5, 70}), random({33, 70}), random({3, 5, 33}), c, t);
      check_rounding(kMatmul, random({2, 9, 48}), random({2, 48, 17}), random({2, 9, 17}), c, t);
      const ComputeScope scope(c);
      const Tensor x = random({4, 6});
      CHECK(bit_equal(square(x), x * x));
    }
}

TEST_CASE("what is made to be multiplied has the operands' type on a GPU, and F32 on the CPU") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    Rng rng(5);
    auto random = [&](const Shape& s) { return converted(normal_tensor(rng, s), DType::F32, d); };
    const Tensor x = random({2, 6, 64}), w = random({64}), up = random({2, 6, 64}),
                 proj = random({32, 64}), dy = random({2, 6, 32}), v = random({2, 6, 4, 16});
    const Tensor cos = random({6, 8}), sin = random({6, 8}),
                 at = Tensor::from<int32_t>({0, 1, 2, 3, 4, 5}, {6}, d);
    struct Result {
      Tensor y, dx, dw;
    };
    const auto run = [&](Compute c) {  // every such op, and a product behind each
      const ComputeScope scope(c);
      const Tensor px = parameter(x), pw = parameter(w);
      const Tensor n = rms_norm(px, pw, {}, 1e-5),
                   q = rope(reshape(n, {2, 6, 4, 16}), cos, sin, at);
      const Tensor a = attention(q, q, v, {.scale = 0.25});
      const Tensor rows = fake_quant_rows(reshape(a, {2, 6, 64}), {.bits = 8});
      const Tensor m = silu_mul(px, up);
      const DType want = d.type == DeviceType::CPU ? DType::F32 : operand_dtype(DType::F32);
      for (const Tensor& t : {n, q, a, rows, m}) CHECK(t.dtype() == want);
      const Tensor y = linear(rows, proj) + linear(m, proj);
      CHECK(y.dtype() == DType::F32);
      const Gradients g = backward(sum(y * dy));
      CHECK(g[px].dtype() == DType::F32);
      return Result{y.detach(), g[px], g[pw]};
    };
    const Result exact = run(Compute::F32);
    for (const Compute c : {Compute::BF16, Compute::F16}) {
      CAPTURE(compute_name(c));
      const Result r = run(c);
      const double bound = c == Compute::F16 ? 1e-3 : 2e-2;  // of squares; codes differ
      CHECK(close(r.y, exact.y, bound));
      CHECK(close(r.dx, exact.dx, bound));
      CHECK(close(r.dw, exact.dw, bound));
    }
  }
}

TEST_CASE("compute scopes nest, and F64 stays F64") {
  CHECK(operand_dtype(DType::F32) == DType::F32);
  {
    const ComputeScope outer(Compute::BF16);
    CHECK(operand_dtype(DType::F32) == DType::BF16);
    {
      const ComputeScope inner(Compute::F32);
      CHECK(operand_dtype(DType::F32) == DType::F32);
    }
    CHECK(operand_dtype(DType::F32) == DType::BF16);
    Rng rng(1);
    const Tensor a = normal_tensor(rng, {3, 4}), b = normal_tensor(rng, {4, 2});
    const Tensor y = matmul(a, b);
    CHECK(y.dtype() == DType::F64);
  }
  CHECK(operand_dtype(DType::F32) == DType::F32);
}

}  // namespace omq
