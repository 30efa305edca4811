// Products and attention of every device at the kernel level: random shapes and layouts against
// F64 on the CPU, 16-bit operands, guard words around every output, and the same bits every time.
//
// Bounds (NMSE): F32 sums 1e-11. Results rounded to 16 bits, or sums of rounded probabilities: the
// square of half a unit in the last place, 2⁻⁹ for bf16 (4e-6) and 2⁻¹² for f16, times ten for
// gradients, which go through two roundings.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "tensor/kernels.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq {
namespace {

constexpr double kGuard = -12345;

// A contiguous output between two runs of guard words.
struct Guarded {
  static constexpr int64_t kWords = 128;
  Tensor all, view;
  Guarded(Shape shape, DType dtype, Device device)
      : all(Tensor::full({shape.product() + 2 * kWords}, kGuard, dtype, device)),
        view(all.alias(shape, contiguous_strides(shape), kWords)) {}
  bool untouched() const {
    const std::vector<double> v = values(all);
    const double want = values(Tensor::full({1}, kGuard, all.dtype()))[0];
    const size_t end = v.size() - kWords;
    for (size_t i = 0; i < kWords; ++i)
      if (v[i] != want || v[end + i] != want) return false;
    return true;
  }
};

// ---- matmul ----

// [batches…, rows, cols] in one of the layouts that views make.
Tensor laid_out(Rng& rng, const Shape& batch, int64_t rows, int64_t cols, int layout) {
  const auto with = [&](int64_t r, int64_t c) {
    Shape s = batch;
    s.push_back(r);
    s.push_back(c);
    return s;
  };
  const Shape shape = with(rows, cols);
  const int n = shape.n;
  switch (layout) {
    case 0:
      return random_tensor(rng, shape);
    case 1: {  // transposed
      const Tensor x = random_tensor(rng, with(cols, rows));
      Strides s = x.strides();
      std::swap(s[n - 1], s[n - 2]);
      return x.alias(shape, s);
    }
    case 2: {  // a window of wider rows
      const Tensor x = random_tensor(rng, with(rows, cols + 5));
      return x.alias(shape, x.strides(), 3);
    }
    case 3: {  // no stride is 1
      const Tensor x = random_tensor(rng, with(rows, 3 * cols));
      Strides s = x.strides();
      s[n - 1] = 3;
      return x.alias(shape, s, 1);
    }
    case 4: {  // one row, repeated
      Strides s = contiguous_strides(with(1, cols));
      s[n - 2] = 0;
      return random_tensor(rng, with(1, cols)).alias(shape, s);
    }
    default: {  // one matrix for all batches
      const Tensor x = random_tensor(rng, {rows, cols});
      Strides s = shape;
      for (int i = 0; i < n; ++i) s[i] = 0;
      s[n - 2] = cols;
      s[n - 1] = 1;
      return x.alias(shape, s);
    }
  }
}

// x rounded to dtype on a device, in the same layout (the whole Storage is converted).
Tensor in_type(const Tensor& x, DType dtype, Device device) {
  const size_t size = dtype_size(x.dtype());
  const auto count = static_cast<int64_t>(x.storage()->bytes() / size);
  const Tensor whole = Tensor::view(x.storage(), 0, {count}, x.dtype());
  const auto offset = static_cast<const char*>(x.raw()) - static_cast<const char*>(whole.raw());
  return converted(whole, dtype, device)
      .alias(x.shape(), x.strides(), static_cast<int64_t>(static_cast<size_t>(offset) / size));
}

struct Product {
  Shape batch;
  int64_t m, k, n;
  int layout_a, layout_b;
};

void check_product(const Product& p, DType operands, DType result, Device device, double bound) {
  CAPTURE(p.m);
  CAPTURE(p.k);
  CAPTURE(p.n);
  CAPTURE(p.layout_a);
  CAPTURE(p.layout_b);
  CAPTURE(device);
  CAPTURE(std::string(dtype_name(operands)));
  Rng rng(static_cast<uint64_t>(p.m * 31 + p.k * 7 + p.n + p.layout_a * 1000 + p.layout_b));
  const Tensor a = in_type(laid_out(rng, p.batch, p.m, p.k, p.layout_a), operands, device),
               b = in_type(laid_out(rng, p.batch, p.k, p.n, p.layout_b), operands, device);
  Shape shape = p.batch;
  shape.push_back(p.m);
  shape.push_back(p.n);
  Tensor exact = Tensor::empty(shape, DType::F64);
  cpu::matmul(exact, converted(a, DType::F64), converted(b, DType::F64));
  Guarded y(shape, result, device);
  on(a).matmul(y.view, a, b);
  CHECK(close(y.view, exact, bound));
  CHECK(y.untouched());
}

// ---- attention ----

struct Case {
  int64_t B, T, S, H, K, d;
  bool causal = true, in_one_tensor = false;  // q, k, v as windows of wider rows
};

struct Inputs {
  Tensor q, k, v, dy;  // F64, contiguous rows
  AttentionSpec spec;
};

Inputs inputs_of(const Case& c) {
  Rng rng(static_cast<uint64_t>(c.T * 1000 + c.S * 10 + c.d));
  const auto heads = [&](int64_t rows, int64_t count) {
    const int64_t width = count * c.d + (c.in_one_tensor ? 24 : 0);
    return normal_tensor(rng, {c.B, rows, width})
        .alias({c.B, rows, count, c.d}, {rows * width, width, c.d, 1}, c.in_one_tensor ? 8 : 0);
  };
  return {heads(c.T, c.H),
          heads(c.S, c.K),
          heads(c.S, c.K),
          normal_tensor(rng, {c.B, c.T, c.H, c.d}),
          {.scale = 1 / std::sqrt(static_cast<double>(c.d)), .causal = c.causal}};
}

struct Outcome {
  Guarded y, lse, dq, dk, dv;
  Outcome(const Case& c, DType dtype, DType stats, Device d)
      : y({c.B, c.T, c.H, c.d}, dtype, d),
        lse({c.B, c.H, c.T}, stats, d),
        dq({c.B, c.T, c.H, c.d}, dtype, d),
        dk({c.B, c.S, c.K, c.d}, dtype, d),
        dv({c.B, c.S, c.K, c.d}, dtype, d) {}
  bool untouched() const {
    for (const Guarded* g : {&y, &lse, &dq, &dk, &dv})
      if (!g->untouched()) return false;
    return true;
  }
};

// Forward and backward with operands of one type and outputs of another.
Outcome run(const Case& c, const Inputs& x, DType operands, DType results, Device device) {
  const Tensor q = in_type(x.q, operands, device), k = in_type(x.k, operands, device),
               v = in_type(x.v, operands, device), dy = in_type(x.dy, results, device);
  Outcome o(c, results, operands == DType::F64 ? DType::F64 : DType::F32, device);
  const DenseKernels& kernels = on(q);
  kernels.attention(o.y.view, o.lse.view, q, k, v, x.spec);
  kernels.attention_vjp(o.dq.view, o.dk.view, o.dv.view, q, k, v, o.y.view, o.lse.view, dy, x.spec);
  return o;
}

// With one key the scores do not matter: their gradients are zero but for rounding.
void check_gradient(const Tensor& got, const Tensor& want, double bound) {
  double most = 0;
  for (double v : values(want)) most = std::max(most, std::abs(v));
  if (most < 1e-6)
    CHECK(within(got, want, 1e-2));
  else
    CHECK(close(got, want, bound));
}

void check_attention(const Case& c, DType operands, DType results, Device device, double bound) {
  CAPTURE(c.causal);
  CAPTURE(device);
  INFO("B " << c.B << " T " << c.T << " S " << c.S << " H " << c.H << " K " << c.K << " d " << c.d
            << " " << std::string(dtype_name(operands)) << " → "
            << std::string(dtype_name(results)));
  Inputs x = inputs_of(c);
  for (Tensor* t : {&x.q, &x.k, &x.v}) *t = in_type(in_type(*t, operands, {}), DType::F64, {});
  x.dy = in_type(in_type(x.dy, results, {}), DType::F64, {});
  const Outcome want = run(c, x, DType::F64, DType::F64, {}),
                got = run(c, x, operands, results, device);
  CHECK(close(got.y.view, want.y.view, bound));
  CHECK(close(got.lse.view, want.lse.view, 1e-11));
  check_gradient(got.dq.view, want.dq.view, 10 * bound);
  check_gradient(got.dk.view, want.dk.view, 10 * bound);
  check_gradient(got.dv.view, want.dv.view, 10 * bound);
  CHECK(got.untouched());
}

const std::vector<Case>& cases() {
  static const std::vector<Case> list = {{1, 128, 128, 2, 2, 128},
                                         {1, 100, 100, 2, 1, 128, true, true},
                                         {2, 37, 165, 4, 2, 64},
                                         {1, 200, 200, 2, 1, 80, true, true},
                                         {1, 5, 300, 2, 2, 16},
                                         {1, 70, 90, 4, 1, 128, false},
                                         {1, 1, 33, 1, 1, 64},
                                         {1, 129, 257, 3, 1, 96},
                                         {2, 65, 65, 2, 1, 16, true, true},
                                         {1, 33, 40, 2, 1, 200},
                                         {1, 20, 50, 2, 2, 5},
                                         {1, 1, 1, 2, 1, 64}};
  return list;
}

bool is_gpu(Device d) { return d.type == DeviceType::CUDA; }

}  // namespace

TEST_CASE("devices: products of random shapes and layouts agree with F64") {
  for (Device d : test_devices())
    for (int layout_a = 0; layout_a < 6; ++layout_a)
      for (int layout_b = 0; layout_b < 6; ++layout_b) {
        check_product({{}, 33, 70, 41, layout_a, layout_b}, DType::F32, DType::F32, d, 1e-11);
        check_product({{2, 3}, 7, 16, 24, layout_a, layout_b}, DType::F32, DType::F32, d, 1e-11);
        check_product({{}, 64, 96, 40, layout_a, layout_b}, DType::BF16, DType::F32, d, 1e-11);
        check_product({{3}, 5, 17, 9, layout_a, layout_b}, DType::F16, DType::F32, d, 1e-11);
        if (is_gpu(d))
          check_product({{2}, 24, 64, 48, layout_a, layout_b}, DType::BF16, DType::BF16, d, 4e-6);
      }
}

// Longer than what the CPU's tiles of bf16 hold of the inner dimension at a time, with edges.
TEST_CASE("devices: products of long bf16 rows agree with F64") {
  for (Device d : test_devices())
    for (int layout_a = 0; layout_a < 3; ++layout_a)
      for (int layout_b = 0; layout_b < 3; ++layout_b)
        for (const Product& p : {Product{{}, 49, 1101, 83, layout_a, layout_b},
                                 Product{{2}, 32, 1024, 64, layout_a, layout_b}})
          check_product(p, DType::BF16, DType::F32, d, 1e-11);
}

// A transposed operand whose rows lie a multiple of 2 KiB apart: a CPU without AVX-512 gathers it.
TEST_CASE("devices: products of operands of wide strides agree with F64") {
  for (Device d : test_devices())
    for (int layout_a = 0; layout_a < 3; ++layout_a)
      for (const Product& p :
           {Product{{}, 512, 160, 256, layout_a, 0}, Product{{2}, 1024, 140, 300, layout_a, 1},
            Product{{}, 1536, 130, 300, layout_a, 0}})
        check_product(p, DType::F32, DType::F32, d, 1e-11);
}

TEST_CASE("devices: products of extreme shapes") {
  for (Device d : test_devices())
    for (const Product& p : {Product{{}, 1, 300, 200, 0, 1}, Product{{}, 200, 300, 1, 1, 0},
                             Product{{}, 1, 1, 1, 0, 0}, Product{{}, 257, 1, 130, 0, 0},
                             Product{{4}, 1, 64, 1, 1, 1}, Product{{1, 1}, 12, 8, 16, 2, 2}})
      for (DType t : {DType::F32, DType::BF16}) check_product(p, t, DType::F32, d, 1e-11);
}

TEST_CASE("devices: attention in F32 agrees with F64") {
  for (Device d : test_devices())
    for (const Case& c : cases()) check_attention(c, DType::F32, DType::F32, d, 1e-11);
}

TEST_CASE("devices: attention of 16-bit operands agrees with F64") {
  for (Device d : test_devices()) {
    for (const Case& c : cases()) {
      check_attention(c, DType::BF16, DType::F32, d, 8e-6);
      if (is_gpu(d)) check_attention(c, DType::BF16, DType::BF16, d, 8e-6);
      check_attention(c, DType::F16, DType::F32, d, 2e-7);
    }
  }
}

TEST_CASE("devices: products and attention give the same bits a hundred times") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    const int rounds = static_cast<int>(is_gpu(d) ? all_or_few(100, 3) : 2);
    const Case c{1, 190, 190, 4, 2, 64};
    const Inputs x = inputs_of(c);
    for (DType t : {DType::F32, DType::BF16}) {
      const Outcome first = run(c, x, t, DType::F32, d);
      const Tensor a = in_type(x.q, t, d).alias({190, 256}, {256, 1});
      Tensor y = Tensor::empty({256, 256}, DType::F32, d), again = empty_like(y);
      const Tensor left = a.alias({256, 190}, {1, 256});
      on(a).matmul(y, left, a);
      for (int i = 1; i < rounds; ++i) {
        const Outcome o = run(c, x, t, DType::F32, d);
        on(a).matmul(again, left, a);
        REQUIRE(bit_equal(o.y.view, first.y.view));
        REQUIRE(bit_equal(o.dq.view, first.dq.view));
        REQUIRE(bit_equal(o.dk.view, first.dk.view));
        REQUIRE(bit_equal(o.dv.view, first.dv.view));
        REQUIRE(bit_equal(again, y));
      }
    }
  }
}

}  // namespace omq
