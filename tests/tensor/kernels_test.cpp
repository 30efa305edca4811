// CPU kernels below the ops: odd sizes and strides against F64, and the same bits on any number of
// threads.
#include "tensor/kernels.h"

#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "tensor/cpu/gemm.h"
#include "tensor/numeric.h"
#include "tensor/parallel.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq {
namespace {

Tensor transposed(const Tensor& x) {
  Shape shape = x.shape();
  Strides strides = x.strides();
  std::swap(shape[x.ndim() - 1], shape[x.ndim() - 2]);
  std::swap(strides[x.ndim() - 1], strides[x.ndim() - 2]);
  return x.alias(shape, strides);
}

// [.., rows, cols] in one of the layouts that views make.
Tensor laid_out(Rng& rng, int64_t rows, int64_t cols, int layout, DType dtype) {
  switch (layout) {
    case 0:
      return random_tensor(rng, {rows, cols}, dtype);
    case 1:
      return transposed(random_tensor(rng, {cols, rows}, dtype));
    case 2:
      return random_tensor(rng, {rows, cols + 5}, dtype).alias({rows, cols}, {cols + 5, 1}, 3);
    case 3:
      return random_tensor(rng, {rows, 3 * cols}, dtype)
          .alias({rows, cols}, {3 * cols, 3}, 1);  // no stride is 1
    case 4:
      return random_tensor(rng, {1, cols}, dtype).alias({rows, cols}, {0, 1});
    default:
      return random_tensor(rng, {rows, 1}, dtype).alias({rows, cols}, {1, 0});
  }
}

void check_matmul(Rng& rng, int64_t m, int64_t k, int64_t n, int layout_a, int layout_b) {
  CAPTURE(m);
  CAPTURE(k);
  CAPTURE(n);
  CAPTURE(layout_a);
  CAPTURE(layout_b);
  const Tensor a = laid_out(rng, m, k, layout_a, DType::F32),
               b = laid_out(rng, k, n, layout_b, DType::F32);
  Tensor y = Tensor::full({m, n}, 99, DType::F32), exact = Tensor::empty({m, n}, DType::F64);
  cpu::matmul(y, a, b);
  cpu::matmul(exact, converted(a, DType::F64), converted(b, DType::F64));
  CHECK(close(y, exact, 1e-11));  // expanded operands repeat one rounding error k times
}

// Runs f on 1, 2 and 5 threads; what it returns must not change by a bit.
void check_threads(const std::string& name, const std::function<std::vector<Tensor>()>& f) {
  CAPTURE(name);
  const int before = num_threads();
  set_num_threads(1);
  const std::vector<Tensor> want = f();
  for (int threads : {2, 5}) {
    set_num_threads(threads);
    CAPTURE(threads);
    for (int round = 0; round < 3; ++round) {
      const std::vector<Tensor> got = f();
      REQUIRE(got.size() == want.size());
      for (size_t i = 0; i < got.size(); ++i) {
        CAPTURE(i);
        CHECK(bit_equal(got[i], want[i]));
      }
    }
  }
  set_num_threads(before);
}

}  // namespace

TEST_CASE("matmul agrees with F64 for every layout") {
  CAPTURE(cpu::gemm_name());
  Rng rng(2);
  for (int a = 0; a < 6; ++a)
    for (int b = 0; b < 6; ++b) check_matmul(rng, 37, 29, 41, a, b);
}

TEST_CASE("matmul agrees with F64 for odd sizes") {
  struct Product {
    int64_t m, k, n;
    int a, b;
  };
  for_all(
      60,
      [](Rng& r) {
        return Product{r.between(1, 70), r.between(1, 300), r.between(1, 70),
                       static_cast<int>(r.between(0, 5)), static_cast<int>(r.between(0, 5))};
      },
      [](const Product& p) {
        Rng rng(p.m * 1000 + p.k);
        check_matmul(rng, p.m, p.k, p.n, p.a, p.b);
      });
  Rng rng(4);
  for (int64_t m : {1, 255, 257})  // around the borders of tiles
    for (int64_t n : {1, 15, 769, 1537}) check_matmul(rng, m, 33, n, 0, 1);
  check_matmul(rng, 130, 520, 140, 1, 1);  // worth cutting in four
}

TEST_CASE("matmul of nothing is nothing, and a sum over nothing is zero") {
  for (DType dtype : {DType::F32, DType::F64}) {
    Tensor y = Tensor::full({2, 3}, 7, dtype), none = Tensor::empty({0, 3}, dtype);
    cpu::matmul(y, Tensor::empty({2, 0}, dtype), Tensor::empty({0, 3}, dtype));
    CHECK(bit_equal(y, Tensor::zeros({2, 3}, dtype)));
    CHECK_NOTHROW(cpu::matmul(none, Tensor::empty({0, 4}, dtype), Tensor::zeros({4, 3}, dtype)));
  }
}

TEST_CASE("gemm_tile writes only its window, and accumulates") {
  Rng rng(9);
  const Tensor a = random_tensor(rng, {7, 9}, DType::F32),
               b = random_tensor(rng, {9, 5}, DType::F32);
  Tensor product = Tensor::empty({7, 5}, DType::F32), c = Tensor::full({9, 8}, 3, DType::F32);
  cpu::matmul(product, a, b);
  float* window = c.data<float>() + 8 + 2;
  for (int round = 0; round < 3; ++round)
    cpu::gemm_tile(7, 5, 9, a.data<float>(), 9, 1, b.data<float>(), 5, 1, window, 8, round > 0);
  for (int64_t i = 0; i < 9; ++i)
    for (int64_t j = 0; j < 8; ++j) {
      const bool inside = i >= 1 && i < 8 && j >= 2 && j < 7;
      const float want = inside ? 3 * product.data<float>()[(i - 1) * 5 + j - 2] : 3.0f;
      CHECK(c.data<float>()[i * 8 + j] == doctest::Approx(want).epsilon(1e-5));
    }
}

TEST_CASE("copy converts between any two dtypes, and keeps what both can hold") {
  const DType all[] = {DType::F64, DType::F32, DType::BF16, DType::F16,
                       DType::I32, DType::I8,  DType::U8};
  const Tensor source = Tensor::from<double>({0, 1, 2, 3, 100, 127}, {2, 3});
  for (Device d : test_devices())
    for (DType from : all)
      for (DType to : all) {
        if (d.type != DeviceType::CPU && (from == DType::F64 || to == DType::F64))
          continue;  // F64: CPU only
        CAPTURE(d);
        CAPTURE(dtype_name(from));
        CAPTURE(dtype_name(to));
        const Tensor x = transposed(converted(source, from, d));
        Tensor y = Tensor::empty({3, 2}, to, d);
        on(x).copy(y, x);
        CHECK(bit_equal(converted(y, DType::F64), converted(transposed(source), DType::F64)));
      }
  Tensor wrong = Tensor::empty({3}, DType::F32);
  CHECK_THROWS_WITH_AS(cpu::copy(wrong, source), "copy: [2, 3] into [3]", Error);
  Tensor rounded = Tensor::empty({3}, DType::BF16);
  cpu::copy(rounded, Tensor::from<float>({1.00390625f, 1.01171875f, -3.0e38f}, {3}));
  CHECK(converted(rounded, DType::F32).to_vector<float>()[0] == 1.0f);  // half to even
  CHECK(converted(rounded, DType::F32).to_vector<float>()[1] == 1.015625f);
}

TEST_CASE("fill writes through strides and leaves the rest") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    const Tensor x = Tensor::zeros({4, 5}, DType::F32, d);
    Tensor window = x.alias({4, 2}, {5, 2}, 1);
    on(window).fill(window, 6);
    double sum = 0;
    for (double v : values(x)) sum += v;
    CHECK(sum == 48);
    CHECK(values(x)[1] == 6);
    CHECK(values(x)[2] == 0);
  }
}

TEST_CASE("a long sum is exact to F32") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    const Tensor x = Tensor::full({300, 2001}, 0.1, DType::F32, d);
    const double each = static_cast<double>(0.1f);
    for (const Shape& to : {Shape{1, 1}, Shape{300, 1}, Shape{1, 2001}}) {
      Tensor y = Tensor::empty(to, DType::F32, d);
      on(x).sum_to(y, x);
      const double want = each * static_cast<double>(x.numel() / y.numel());
      for (double v : values(y)) CHECK(v == doctest::Approx(want).epsilon(1e-6));
    }
  }
}

TEST_CASE("group_range finds the extremes of every group, the short last one too") {
  const Tensor x = Tensor::from<float>({1, -2, 3, 0.5f, 2, /**/ -1, -4, -2, -3, -5}, {2, 5});
  for (Device d : test_devices()) {
    CAPTURE(d);
    const Tensor xd = converted(x, DType::F32, d);
    Tensor hi = Tensor::empty({2, 2}, DType::F32, d), lo = empty_like(hi);
    on(xd).group_range(hi, lo, xd, {.group_size = 3});
    CHECK(close(hi, Tensor::from<float>({3, 2, 0, 0}, {2, 2}), 0));
    CHECK(close(lo, Tensor::from<float>({-2, 0, -4, -5}, {2, 2}), 0));
    on(xd).group_range(hi, lo, xd, {.group_size = 3, .include_zero = false});
    CHECK(close(hi, Tensor::from<float>({3, 2, -1, -3}, {2, 2}), 0));
    CHECK(close(lo, Tensor::from<float>({-2, 0.5f, -4, -5}, {2, 2}), 0));
  }
}

TEST_CASE("group_range finds an extreme wherever it stands in a group of any length") {
  for (Device d : test_devices())
    for (const int64_t n : {1, 7, 31, 32, 33, 64, 71, 96}) {
      CAPTURE(d);
      CAPTURE(n);
      // Row r: its largest at column r, its smallest at column n − 1 − r; all else between.
      Tensor x = Tensor::full({n, n}, 0.5f);
      for (int64_t r = 0; r < n; ++r) {
        x.data<float>()[r * n + (n - 1 - r)] = -3 - static_cast<float>(r);
        x.data<float>()[r * n + r] = 2 + static_cast<float>(r);
      }
      const Tensor xd = converted(x, DType::F32, d);
      Tensor hi = Tensor::empty({n, 1}, DType::F32, d), lo = empty_like(hi);
      on(xd).group_range(hi, lo, xd, {.group_size = 0, .include_zero = false});
      const auto highs = values(hi), lows = values(lo);
      for (int64_t r = 0; r < n; ++r) {
        CAPTURE(r);
        CHECK(highs[static_cast<size_t>(r)] == 2 + static_cast<double>(r));
        // In the middle row of an odd number both stand at one column, and the largest stays.
        const double smallest = 2 * r + 1 != n ? -3 - static_cast<double>(r)
                                : n == 1       ? 2 + static_cast<double>(r)
                                               : 0.5;
        CHECK(lows[static_cast<size_t>(r)] == smallest);
      }
    }
}

TEST_CASE("embedding reads tables of every float type and refuses ids outside") {
  for (Device d : test_devices())
    for (DType dtype : {DType::F32, DType::BF16, DType::F16}) {
      CAPTURE(d);
      const Tensor table = converted(Tensor::from<float>({0, 1, 2, 3, 4, 5}, {3, 2}), dtype, d);
      Tensor y = Tensor::empty({2, 2}, DType::F32, d);
      on(table).embedding(y, table, Tensor::from<int32_t>({2, 0}, {2}, d));
      CHECK(close(y, Tensor::from<float>({4, 5, 0, 1}, {2, 2}), 0));
    }
  const Tensor table = Tensor::zeros({3, 2});
  Tensor y = Tensor::empty({1, 2}, DType::F32);
  CHECK_THROWS_WITH_AS(cpu::embedding(y, table, Tensor::from<int32_t>({3}, {1})),
                       "embedding: id 3 outside the vocabulary of 3", Error);
  CHECK_THROWS_WITH_AS(
      cpu::embedding(y, Tensor::zeros({3, 2}, DType::I8), Tensor::from<int32_t>({0}, {1})),
      "embedding: a table of I8 cannot be read", Error);
}

TEST_CASE("products and attention have the same bits on any number of threads") {
  Rng rng(5);
  const Tensor a = random_tensor(rng, {300, 130}, DType::F32),
               b = random_tensor(rng, {130, 800}, DType::F32);
  check_threads("matmul", [&] {
    Tensor y = Tensor::empty({300, 800}, DType::F32);
    cpu::matmul(y, a, b);
    return std::vector<Tensor>{y};
  });
  const Tensor q = random_tensor(rng, {1, 150, 4, 16}, DType::F32),
               k = random_tensor(rng, {1, 170, 2, 16}, DType::F32);
  const Tensor v = random_tensor(rng, k.shape(), DType::F32),
               dy = random_tensor(rng, q.shape(), DType::F32);
  check_threads("attention, attention_vjp", [&] {
    Tensor y = empty_like(q), lse = Tensor::empty({1, 4, 150}, DType::F32);
    Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
    const AttentionSpec spec{.scale = 0.25};
    cpu::attention(y, lse, q, k, v, spec);
    cpu::attention_vjp(dq, dk, dv, q, k, v, y, lse, dy, spec);
    return std::vector<Tensor>{y, lse, dq, dk, dv};
  });
}

TEST_CASE("sums and losses have the same bits on any number of threads") {
  Rng rng(6);
  const Tensor x = random_tensor(rng, {700, 301}, DType::F32),
               w = random_tensor(rng, {301}, DType::F32);
  const Tensor dy = random_tensor(rng, x.shape(), DType::F32),
               targets = random_ids(rng, {700}, 301);
  check_threads("sum_to", [&] {
    std::vector<Tensor> out;
    for (const Shape& to : {Shape{1, 1}, Shape{700, 1}, Shape{1, 301}}) {
      Tensor y = Tensor::empty(to, DType::F32);
      cpu::sum_to(y, x);
      out.push_back(y);
    }
    return out;
  });
  check_threads("cross_entropy", [&] {
    Tensor loss = Tensor::empty({700}, DType::F32), lse = empty_like(loss), dx = empty_like(x);
    cpu::cross_entropy(loss, lse, x, targets);
    cpu::cross_entropy_vjp(dx, x, lse, targets, lse);
    return std::vector<Tensor>{loss, lse, dx};
  });
  check_threads("rms_norm_vjp", [&] {
    Tensor dx = empty_like(x), dw = empty_like(w), db = empty_like(w);
    cpu::rms_norm_vjp(dx, dw, db, x, w, dy, 1e-5);
    return std::vector<Tensor>{dx, dw, db};
  });
  check_threads("embedding_vjp", [&] {
    Tensor table = Tensor::empty({301, 301}, DType::F32);
    cpu::embedding_vjp(table, targets, dy);
    return std::vector<Tensor>{table};
  });
  const GroupSpec spec{.bits = 3, .group_size = 64};
  check_threads("group_range and fake_quant", [&] {
    Tensor hi = Tensor::empty({700, 5}, DType::F32), lo = empty_like(hi), dx = empty_like(x),
           ds = empty_like(hi);
    Tensor y = empty_like(x), codes = Tensor::empty(x.shape(), DType::U8);
    const Tensor h = Tensor::full({700, 5}, 0.3), z = Tensor::full({700, 5}, 3);
    cpu::group_range(hi, lo, x, spec);
    cpu::fake_quant(y, x, h, z, spec);
    cpu::fake_quant_vjp(dx, ds, x, h, z, dy, spec);
    cpu::quantize_codes(codes, x, h, z, spec);
    return std::vector<Tensor>{hi, lo, y, dx, ds, codes};
  });
}

TEST_CASE("scalar kernels have the same bits on any number of threads") {
  Rng rng(7);
  const Tensor x = random_tensor(rng, {333, 500}, DType::F32),
               g = random_tensor(rng, x.shape(), DType::F32);
  check_threads("unary, binary, silu_mul, softmax, rope, adamw", [&] {
    Tensor a = empty_like(x), b = empty_like(x), c = empty_like(x), d = empty_like(x),
           dg = empty_like(x);
    cpu::unary(a, transposed(converted(transposed(x), DType::F32)), {UnaryKind::Silu});
    cpu::binary(b, x, g, Binary::Div);
    cpu::silu_mul(c, x, g);
    cpu::silu_mul_vjp(d, dg, x, g, a);
    Tensor s = empty_like(x), ds = empty_like(x);
    cpu::softmax(s, x);
    cpu::softmax_vjp(ds, s, g);
    Tensor p = converted(x, DType::F32), m = Tensor::zeros(x.shape()), v = Tensor::zeros(x.shape());
    Tensor clock = Tensor::zeros({4}, DType::F64);
    const AdamWStep step{1e-2, 0.9, 0.999, 1e-8, 0.1};
    cpu::adamw_tick(clock, {}, step);
    cpu::adamw(p, m, v, g, clock, step);
    return std::vector<Tensor>{a, b, c, d, dg, s, ds, p, m, v};
  });
}

}  // namespace omq
