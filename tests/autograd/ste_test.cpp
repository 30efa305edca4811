// Straight-through ops. Differences cannot check them, so they are held by the closed forms of the
// quantiser's gradient (spec omniquant §2.6), written out here in plain C++, and by the test
// vectors of its §2.7, which the official code computed. The quantiser of these tests is built from
// sigmoid, group_range, clamp and fake_quant exactly as quant/ builds it:  h = clamp((σ(u)·max −
// σ(l)·min)/(2ᵇ−1), 1e-5, 1e4),  z = clamp(⌊−σ(l)·min/h⌉, −1e4, 1e4).
#include <doctest/doctest.h>

#include <cmath>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq {
namespace {

const std::vector<float> kRow = {-0.9f, -0.31f, -0.05f, 0.02f, 0.11f, 0.27f, 0.44f, 1.2f};
const std::vector<float> kUpstream = {1, -2, 0.5f, 3, -1, 2, -0.5f, 4};

struct Quantised {
  Tensor y, h, z;
};

// Learnable clipping, asymmetric.
Quantised quantised(const Tensor& x, const Tensor& u, const Tensor& l, GroupSpec s) {
  const Range r = group_range(x, s);
  const Tensor hi = sigmoid(u) * r.hi, lo = sigmoid(l) * r.lo;
  const Tensor h = clamp((hi - lo) / static_cast<double>(s.max_code()), 1e-5, 1e4);
  const Tensor z = round(clamp(-lo / h, -1e4, 1e4)).detach();
  return {fake_quant(x, h, z, s), h, z};
}

// Symmetric: `steps` codes on the positive side, zero point `zero`.
Quantised quantised_symmetric(const Tensor& x, const Tensor& u, const Tensor& l, GroupSpec s,
                              double steps, double zero) {
  const Range r = group_range(x, s);
  const Tensor h =
      clamp(maximum(abs(sigmoid(u) * r.hi), abs(sigmoid(l) * r.lo)) / steps, 1e-5, 1e4);
  const Tensor z = to(Tensor::full(h.shape(), zero, h.dtype()), h.device());
  return {fake_quant(x, h, z, s), h, z};
}

std::vector<int> codes_of(const Tensor& x, const Quantised& q, GroupSpec s) {
  Tensor codes = Tensor::empty(x.shape(), DType::U8, x.device());
  on(x).quantize_codes(codes, x, q.h.detach(), q.z, s);
  std::vector<int> out;
  for (uint8_t c : converted(codes, DType::U8).to_vector<uint8_t>()) out.push_back(c);
  return out;
}

struct Vector {  // a row of §2.7
  int bits;
  double u, l, h, z;
  std::vector<int> codes;
  double du, dl;
  std::vector<float> dx;  // empty: not given
};

void check_vector(const Vector& want, Device d) {
  const GroupSpec spec{.bits = want.bits, .include_zero = false, .end_codes_learn = true};
  const Tensor x = parameter(Tensor::from<float>(kRow, {1, 8}, d));
  const Tensor u = parameter(Tensor::full({1, 1}, want.u, DType::F32, d));
  const Tensor l = parameter(Tensor::full({1, 1}, want.l, DType::F32, d));
  const Quantised q = quantised(x, u, l, spec);
  CHECK(q.h.item<float>() == doctest::Approx(want.h).epsilon(1e-7));
  CHECK(q.z.item<float>() == want.z);
  CHECK(codes_of(x, q, spec) == want.codes);
  const Gradients g = backward(sum(q.y * Tensor::from<float>(kUpstream, {1, 8}, d)));
  CHECK(g[u].item<float>() == doctest::Approx(want.du).epsilon(2e-6));
  CHECK(g[l].item<float>() == doctest::Approx(want.dl).epsilon(2e-6));
  if (!want.dx.empty()) CHECK(within(g[x], Tensor::from<float>(want.dx, {1, 8}), 1e-6));
}

// The closed form of §2.6 for a matrix in double: gradients of Σ g ⊙ quantised(x, u, l).
struct ClosedForm {
  Tensor dx, du, dl;
  bool extremes_hit = false;  // a code was clamped somewhere
};

ClosedForm closed_form(const Tensor& x, const Tensor& u, const Tensor& l, const Tensor& upstream,
                       GroupSpec s) {
  const int64_t rows = x.dim(0), cols = x.dim(1), groups = s.groups(cols),
                width = s.group_cols(cols);
  const double top = s.max_code();
  const auto sigma = [](double v) { return 1 / (1 + std::exp(-v)); };
  ClosedForm out{empty_like(x), empty_like(u), empty_like(l)};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n = std::min(width, cols - g * width), at = r * groups + g;
      const double *p = x.data<double>() + r * cols + g * width,
                   *up = upstream.data<double>() + r * cols + g * width;
      double hi = s.include_zero ? 0 : p[0], lo = hi, n_hi = 0, n_lo = 0;
      for (int64_t j = 0; j < n; ++j) hi = std::max(hi, p[j]), lo = std::min(lo, p[j]);
      for (int64_t j = 0; j < n; ++j) n_hi += p[j] == hi, n_lo += p[j] == lo;
      const double su = sigma(u.data<double>()[at]), sl = sigma(l.data<double>()[at]);
      const double raw = (su * hi - sl * lo) / top, h = std::clamp(raw, 1e-5, 1e4);
      const double z = std::nearbyint(std::clamp(-sl * lo / h, -1e4, 1e4));
      double S = 0;
      double* dx = out.dx.data<double>() + r * cols + g * width;
      for (int64_t j = 0; j < n; ++j) {
        const double t = std::nearbyint(p[j] / h) + z, q = std::clamp(t, 0.0, top);
        const bool inside = s.end_codes_learn ? t >= 0 && t <= top : t > 0 && t < top;
        out.extremes_hit = out.extremes_hit || t != q;
        S += up[j] * ((q - z) - (inside ? p[j] / h : 0));
        dx[j] = inside ? up[j] : 0;
      }
      if (raw != h) S = 0;
      out.du.data<double>()[at] = S * hi * su * (1 - su) / top;
      out.dl.data<double>()[at] = -S * lo * sl * (1 - sl) / top;
      for (int64_t j = 0; j < n; ++j) {
        if (p[j] == hi) dx[j] += S * su / top / n_hi;
        if (p[j] == lo) dx[j] -= S * sl / top / n_lo;
      }
    }
  return out;
}

struct Weights {
  Tensor x, u, l, upstream;
  GroupSpec spec;
};

Weights random_weights(Rng& rng) {
  Weights w;
  w.spec = {.bits = static_cast<int>(rng.between(2, 8)),
            .group_size = rng.between(0, 3) * 7,
            .include_zero = rng.coin(),
            .end_codes_learn = rng.coin()};
  const Shape shape{rng.between(1, 4), rng.between(3, 40)};
  const Shape grid{shape[0], w.spec.groups(shape[1])};
  w.x = normal_tensor(rng, shape);
  if (rng.coin())  // values that repeat: ties at the extremes
    for (int64_t i = 0; i < w.x.numel(); ++i)
      w.x.data<double>()[i] = std::nearbyint(w.x.data<double>()[i]) + 0.25;
  w.u = random_tensor(rng, grid, DType::F64, -2, 5);
  w.l = random_tensor(rng, grid, DType::F64, -2, 5);
  w.upstream = normal_tensor(rng, shape);
  return w;
}

}  // namespace

TEST_CASE("the official test vectors, asymmetric") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    check_vector({3,
                  4,
                  4,
                  0.29460412,
                  3,
                  {0, 2, 3, 3, 3, 4, 4, 7},
                  0.00098634,
                  0.00073976,
                  {0.954301f, -2, 0.5f, 3, -1, 2, -0.5f, 4.0456991f}},
                 d);
    check_vector({2,
                  1,
                  0,
                  0.44242343,
                  1,
                  {0, 0, 1, 1, 1, 2, 2, 3},
                  0.67200857,
                  0.64086449,
                  {-1.4241433f, -2, 0.5f, 3, -1, 2, -0.5f, 2.0822644f}},
                 d);
  }
}

TEST_CASE("the official test vectors, symmetric") {
  const GroupSpec spec{
      .bits = 4, .symmetric = true, .include_zero = false, .end_codes_learn = true};
  const Tensor x = Tensor::from<float>(kRow, {1, 8}), up = Tensor::from<float>(kUpstream, {1, 8});
  struct {
    double zero, du;
    std::vector<int> codes;
  } const cases[] = {
      {7, 1.02056003, {0, 5, 7, 7, 8, 9, 11, 15}},
      {8, 0.88574034, {1, 6, 8, 8, 9, 10, 12, 15}}};  // "no zero point" −7 … 7, moved up by 8
  for (const auto& c : cases) {
    CAPTURE(c.zero);
    const Tensor u = parameter(Tensor::full({1, 1}, 1)), l = parameter(Tensor::full({1, 1}, 2));
    const Quantised q = quantised_symmetric(x, u, l, spec, 7, c.zero);
    CHECK(q.h.item<float>() == doctest::Approx(0.12532434).epsilon(1e-7));
    CHECK(codes_of(x, q, spec) == c.codes);
    const Gradients g = backward(sum(q.y * up));
    CHECK(g[u].item<float>() == doctest::Approx(c.du).epsilon(2e-6));
    CHECK(g[l].item<float>() == 0.0f);  // the smaller side gets nothing
  }
}

TEST_CASE("the official test vectors, round to nearest") {
  const GroupSpec spec{.bits = 4, .include_zero = false};
  const auto rtn = [&](const Tensor& x) {
    const Range r = group_range(x, spec);
    const Tensor h = clamp((r.hi - r.lo) / 15.0, 1e-5, 1e4);
    const Tensor z = round(clamp(-r.lo / h, -1e4, 1e4));
    return Quantised{fake_quant(x, h, z, spec), h, z};
  };
  const Tensor x = Tensor::from<float>(kRow, {1, 8});
  const Quantised q = rtn(x);
  CHECK(q.h.item<float>() == doctest::Approx(0.14).epsilon(1e-6));
  CHECK(q.z.item<float>() == 6);
  CHECK(codes_of(x, q, spec) == std::vector<int>{0, 4, 6, 6, 7, 8, 9, 15});

  const Quantised token = rtn(Tensor::from<float>({0.5f, -1, 2, 3.3f}, {1, 4}));
  CHECK(token.h.item<float>() == doctest::Approx(0.28666669).epsilon(1e-7));
  CHECK(token.z.item<float>() == 3);
  CHECK(within(token.y, Tensor::from<float>({0.57333338f, -0.86f, 2.0066669f, 3.4400003f}, {1, 4}),
               3e-7));
  const Quantised silent = rtn(Tensor::zeros({1, 4}));
  CHECK(silent.h.item<float>() == 1e-5f);
  CHECK(silent.z.item<float>() == 0);
  CHECK(close(silent.y, Tensor::zeros({1, 4}), 0));
  const Quantised constant =
      rtn(Tensor::full({1, 4}, 1));  // the official quirk, with its narrow ranges
  CHECK(constant.z.item<float>() == -10000);
  CHECK(within(constant.y, Tensor::full({1, 4}, 0.10015), 1e-6));
}

TEST_CASE("ranges that hold zero keep a constant row") {
  const GroupSpec spec{.bits = 4};
  const Tensor x = Tensor::full({1, 4}, 1), none = Tensor::full({1, 1}, 50);  // σ(50) = 1
  const Quantised q = quantised(x, none, none, spec);
  CHECK(within(q.y, x, 1e-6));
  CHECK(q.z.item<float>() == 0);
}

TEST_CASE("gradients of the whole quantiser equal the closed form") {
  int clamped = 0;
  for_all(200, random_weights, [&](const Weights& w) {
    const Tensor x = parameter(w.x), u = parameter(w.u), l = parameter(w.l);
    const Gradients g = backward(sum(quantised(x, u, l, w.spec).y * w.upstream));
    const ClosedForm want = closed_form(w.x, w.u, w.l, w.upstream, w.spec);
    clamped += want.extremes_hit;
    CAPTURE(w.spec.bits);
    CAPTURE(w.x.shape());
    CAPTURE(w.spec.group_size);
    CHECK(close(g[x], want.dx, 1e-24));
    CHECK(close(g[u], want.du, 1e-24));
    CHECK(close(g[l], want.dl, 1e-24));
  });
  CHECK(clamped > 50);  // the interesting branch was taken
}

TEST_CASE("fake_quant equals its composition, values and gradients") {
  for (DType dtype : {DType::F64, DType::F32})
    for (int bits : {2, 3, 4, 8})
      for (int64_t group : {0, 8, 24, 10}) {  // 10: the last group is short
        CAPTURE(bits);
        CAPTURE(group);
        const GroupSpec spec{.bits = bits, .group_size = group, .end_codes_learn = bits % 2 == 1};
        Rng rng(static_cast<uint64_t>(bits));
        const Shape grid{5, spec.groups(24)};
        const Tensor x = parameter(normal_tensor(rng, {5, 24}, dtype));
        const Tensor h = parameter(random_tensor(rng, grid, dtype, 0.05, 0.6));
        const Tensor z = round(random_tensor(rng, grid, dtype, 0, spec.max_code()));
        const Tensor dy = normal_tensor(rng, x.shape(), dtype);
        const Tensor fused = fake_quant(x, h, z, spec), plain = fake_quant_composed(x, h, z, spec);
        CHECK(bit_equal(fused, plain));
        const Gradients a = backward(sum(fused * dy)), b = backward(sum(plain * dy));
        const double bound = dtype == DType::F64 ? 1e-26 : 1e-10;  // S cancels where codes are many
        CHECK(close(a[x], b[x], dtype == DType::F64 ? 1e-30 : 1e-13));
        CHECK(close(a[h], b[h], bound));
      }
}

TEST_CASE("fake_quant_lwc equals its composition, values and gradients") {
  for (Device d : test_devices())
    for (DType dtype : {DType::F64, DType::F32})
      for (int64_t group : {0, 8, 10}) {  // 10: the last group is short
        if (dtype == DType::F64 && d.type != DeviceType::CPU) continue;
        CAPTURE(d);
        CAPTURE(group);
        const GroupSpec spec{.bits = 3, .group_size = group};
        Rng rng(9);
        const Shape grid{5, spec.groups(24)};
        const auto there = [&](const Tensor& t) { return parameter(converted(t, dtype, d)); };
        const Tensor x = there(normal_tensor(rng, {5, 24})), u = there(normal_tensor(rng, grid)),
                     l = there(normal_tensor(rng, grid));
        const Tensor dy = converted(normal_tensor(rng, x.shape()), dtype, d);
        const Tensor fused = fake_quant_lwc(x, u, l, spec),
                     plain = fake_quant_lwc_composed(x, u, l, spec);
        CHECK(bit_equal(fused, plain));
        const Gradients a = backward(sum(fused * dy)), b = backward(sum(plain * dy));
        const double bound = dtype == DType::F64 ? 1e-26 : 1e-10;
        for (const Tensor& p : {x, u, l}) CHECK(close(a[p], b[p], bound));
        // A constant matrix gives the same gradients to its clipping.
        const Gradients c = backward(sum(fake_quant_lwc(x.detach(), u, l, spec) * dy));
        CHECK(!c.contains(x));
        for (const Tensor& p : {u, l}) CHECK(close(c[p], b[p], bound));
      }
  const Tensor x = Tensor::zeros({2, 8}), u = Tensor::zeros({2, 1});
  CHECK_THROWS_WITH_AS(fake_quant_lwc(x, u, Tensor::zeros({2, 2}), {.bits = 4}),
                       "fake_quant_lwc: x [2, 8] wants learnables [2, 1], got [2, 1] and [2, 2]",
                       Error);
}

TEST_CASE("fake_quant and the codes tell the same story, on every device") {
  for (Device d : test_devices())
    for (int bits = 2; bits <= 8; ++bits) {
      CAPTURE(d);
      CAPTURE(bits);
      const GroupSpec spec{.bits = bits, .group_size = 16};
      Rng rng(static_cast<uint64_t>(bits));
      const Tensor x =
          converted(normal_tensor(rng, {9, 40}), DType::F32, d);  // 16 + 16 + 8 columns
      const Tensor h = converted(random_tensor(rng, {9, 3}, DType::F64, 0.01, 0.5), DType::F32, d);
      const Tensor z = round(
          converted(random_tensor(rng, {9, 3}, DType::F64, 0, spec.max_code()), DType::F32, d));
      const Tensor y = converted(fake_quant(x, h, z, spec), DType::F32);
      const std::vector<int> codes = codes_of(x, {y, h, z}, spec);
      const std::vector<double> hs = values(h), zs = values(z);
      for (size_t i = 0; i < codes.size(); ++i) {
        const size_t g = i / 40 * 3 + i % 40 / 16;
        CHECK(codes[i] <= spec.max_code());
        CHECK(y.data<float>()[i] == (static_cast<float>(codes[i]) - static_cast<float>(zs[g])) *
                                        static_cast<float>(hs[g]));
      }
    }
}

TEST_CASE("fake_quant takes strided grids and gradients") {
  Rng rng(5);
  const GroupSpec spec{.bits = 3, .group_size = 4};
  const Tensor x = normal_tensor(rng, {3, 8}), h = random_tensor(rng, {3, 2}, DType::F64, 0.1, 0.5);
  const Tensor z = round(random_tensor(rng, {3, 2}, DType::F64, 0, 7)),
               dy = normal_tensor(rng, {3, 8});
  const auto flip = [](const Tensor& t) { return contiguous(transpose(t, 0, 1)); };
  const Tensor x1 = parameter(x), h1 = parameter(h), x2 = parameter(flip(x)),
               h2 = parameter(flip(h));
  const Tensor plain = fake_quant(x1, h1, z, spec);
  const Tensor strided =
      fake_quant(transpose(x2, 0, 1), transpose(h2, 0, 1), transpose(flip(z), 0, 1), spec);
  CHECK(bit_equal(plain, strided));
  const Gradients a = backward(sum(plain * dy)),
                  b = backward(sum(transpose(strided, 0, 1) * flip(dy)));
  CHECK(bit_equal(a[x1], transpose(b[x2], 0, 1)));
  CHECK(bit_equal(a[h1], transpose(b[h2], 0, 1)));
}

TEST_CASE("a tied extreme shares its gradient, the zero point has none") {
  const Tensor x = parameter(Tensor::from<double>({3, -1, 3, 2, -1, -1}, {1, 6}));
  const Range r = group_range(x, {});
  CHECK(backward(sum(r.hi * 12.0 - r.lo * 12.0))[x].to_vector<double>() ==
        std::vector<double>{6, -4, 6, 0, -4, -4});
  const Tensor above =
      parameter(Tensor::from<double>({1, 2}, {1, 2}));  // the low end is the zero that was put in
  const Range wide = group_range(above, {});
  const Gradients g = backward(sum(wide.lo + wide.hi));
  CHECK(g[above].to_vector<double>() == std::vector<double>{0, 1});
  const Tensor l = parameter(Tensor::full({1, 1}, 0.3, DType::F64));
  const Gradients through_z = backward(sum(round(l) + l * 2.0));
  CHECK(through_z[l].item<double>() == 2.0);
}

// §2.6 for activations in double: each row's own extremes, σ = 1.
Tensor rows_closed_form(const Tensor& x, const Tensor& upstream, RowQuant s) {
  Tensor dx = empty_like(x);
  const int64_t n = x.dim(-1);
  const double top = s.max_code();
  for (int64_t at = 0; at < x.numel(); at += n) {
    const double *p = x.data<double>() + at, *up = upstream.data<double>() + at;
    double* d = dx.data<double>() + at;
    double hi = s.include_zero ? 0 : p[0], lo = hi, n_hi = 0, n_lo = 0, S = 0;
    for (int64_t j = 0; j < n; ++j) hi = std::max(hi, p[j]), lo = std::min(lo, p[j]);
    for (int64_t j = 0; j < n; ++j) n_hi += p[j] == hi, n_lo += p[j] == lo;
    const double raw = (hi - lo) * s.clip / top;
    const double h = std::max(raw, s.include_zero ? 1e-30 : 1e-5);
    const double z = std::nearbyint(std::clamp(-lo * s.clip / h, -1e4, 1e4));
    for (int64_t j = 0; j < n; ++j) {
      const double t = std::nearbyint(p[j] / h) + z;
      const bool inside = s.end_codes_learn ? t >= 0 && t <= top : t > 0 && t < top;
      S += up[j] * (std::clamp(t, 0.0, top) - z - (inside ? p[j] / h : 0));
      d[j] = inside ? up[j] : 0;
    }
    const double end = raw == h ? S * s.clip / top : 0;
    for (int64_t j = 0; j < n; ++j)
      d[j] += (p[j] == hi ? end / n_hi : 0) - (p[j] == lo ? end / n_lo : 0);
  }
  return dx;
}

TEST_CASE("gradients of quantised rows equal the closed form") {
  struct Rows {
    Tensor x, upstream;
    RowQuant s;
  };
  const auto random_rows = [](Rng& rng) {
    const Shape shape{rng.between(1, 3), rng.between(1, 4), rng.between(1, 40)};
    Rows r{normal_tensor(rng, shape),
           normal_tensor(rng, shape),
           {.bits = static_cast<int>(rng.between(2, 8)),
            .include_zero = rng.coin(),
            .end_codes_learn = rng.coin(),
            .clip = rng.coin() ? 1 : 0.5 + 0.1 * static_cast<double>(rng.between(0, 4))}};
    const bool ties = rng.coin();
    const double shift = rng.coin() ? 3 : 0;  // rows on one side of zero
    for (int64_t i = 0; i < r.x.numel(); ++i) {
      double& v = r.x.data<double>()[i];
      v = (ties ? std::nearbyint(v) + 0.25 : v) + shift;
    }
    return r;
  };
  for_all(200, random_rows, [&](const Rows& r) {
    const Tensor x = parameter(r.x);
    const Tensor y = fake_quant_rows(x, r.s);
    CAPTURE(r.s.bits);
    CAPTURE(r.s.include_zero);
    CAPTURE(r.s.clip);
    CAPTURE(r.x.shape());
    CHECK(bit_equal(y, fake_quant_rows_composed(r.x, r.s)));
    const Tensor want = rows_closed_form(r.x, r.upstream, r.s);
    CHECK(close(backward(sum(y * r.upstream))[x], want, 1e-24));
    // The share as a tensor: the same codes, and the same gradient in x.
    const Tensor share = parameter(Tensor::full({1}, r.s.clip, DType::F64));
    const Tensor learned = fake_quant_rows(x, r.s, share);
    CHECK(close(learned, y, 1e-24));
    CHECK(close(backward(sum(learned * r.upstream))[x], want, 1e-24));
  });
}

TEST_CASE("quantised rows: constant, silent and strided ones") {
  for (Device d : test_devices())
    for (const int bits : {2, 4, 8}) {
      CAPTURE(d);
      CAPTURE(bits);
      for (const double c : {1.0, -3.7, 1e-12, 6e4, 0.0}) {
        const Tensor x = to(Tensor::full({2, 5}, c), d);
        CHECK(within(fake_quant_rows(x, {.bits = bits}), x, std::abs(c) * 2e-7));
      }
    }
  const Tensor token = Tensor::from<float>({0.5f, -1, 2, 3.3f}, {1, 4});
  const Tensor official =
      Tensor::from<float>({0.57333338f, -0.86f, 2.0066669f, 3.4400003f}, {1, 4});
  CHECK(within(fake_quant_rows(token, {.bits = 4}), official, 3e-7));
  CHECK(within(fake_quant_rows(token, {.bits = 4, .include_zero = false}), official, 3e-7));
  const RowQuant old{.bits = 4, .include_zero = false};
  CHECK(within(fake_quant_rows(Tensor::full({1, 4}, 1), old), Tensor::full({1, 4}, 0.10015), 1e-6));
  Rng rng(4);
  const Tensor x = normal_tensor(rng, {6, 3}), p = parameter(x), q = parameter(x);
  const Tensor dy = normal_tensor(rng, {3, 6});
  const Tensor plain = fake_quant_rows(contiguous(transpose(p, 0, 1)), {.bits = 3}),
               strided = fake_quant_rows(transpose(q, 0, 1), {.bits = 3});
  CHECK(bit_equal(plain, strided));
  CHECK(bit_equal(backward(sum(plain * dy))[p], backward(sum(strided * dy))[q]));
  CHECK_THROWS_WITH_AS(fake_quant_rows(Tensor::zeros({2, 0}), {}),
                       "fake_quant_rows: wants [..., N], got [2, 0]", Error);
  CHECK_THROWS_WITH_AS(fake_quant_rows(x, {.bits = 9}), "fake_quant_rows: 9 bits, 2 to 8 wanted",
                       Error);
}

TEST_CASE("fake_quant refuses grids that do not fit") {
  const Tensor x = Tensor::zeros({2, 8}), grid = Tensor::full({2, 2}, 1),
               row = Tensor::full({2, 1}, 1);
  const GroupSpec spec{.group_size = 4};
  CHECK_THROWS_WITH_AS(fake_quant(x, row, grid, spec),
                       "fake_quant: x [2, 8] wants grids [2, 2], got [2, 1] and [2, 2]", Error);
  CHECK_THROWS_WITH_AS(fake_quant(Tensor::zeros({8}), row, row, spec),
                       "fake_quant: wants [rows, cols], got [8]", Error);
  CHECK_THROWS_WITH_AS(fake_quant(Tensor::zeros({2, 0}), row, row, spec),
                       "fake_quant: wants [rows, cols], got [2, 0]", Error);
  CHECK_THROWS_WITH_AS(fake_quant(x, to(grid, DType::F64), grid, spec),
                       doctest::Contains("holds F64, asked for F32"), Error);
  CHECK_THROWS_WITH_AS(group_range(Tensor::zeros({4}), spec),
                       "group_range: wants [rows, cols], got [4]", Error);
}

TEST_CASE(
    "a zero point that learns: fused = composed on every device, and not without being told") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    for_all(
        30, [](Rng& rng) { return rng; },
        [d](Rng rng) {
          GroupSpec s{.bits = static_cast<int>(rng.between(2, 5)),
                      .group_size = rng.between(0, 3) * 8,
                      .end_codes_learn = rng.coin(),
                      .zero_learns = true};
          const Shape shape{rng.between(1, 5), rng.between(3, 50)};
          const Shape grid{shape[0], s.groups(shape[1])};
          const Tensor x = parameter(to(normal_tensor(rng, shape, DType::F32), d)),
                       h = parameter(to(random_tensor(rng, grid, DType::F32, 0.1, 0.6), d)),
                       z = parameter(to(round(random_tensor(rng, grid, DType::F32, 0, 1) *
                                              static_cast<double>(s.max_code())),
                                        d)),
                       up = to(normal_tensor(rng, shape, DType::F32), d);
          const Gradients fused = backward(sum(fake_quant(x, h, z, s) * up)),
                          composed = backward(sum(fake_quant_composed(x, h, z, s) * up));
          for (const Tensor& t : {x, h, z}) CHECK(within(fused[t], composed[t], 2e-4));
          s.zero_learns = false;
          CHECK_FALSE(backward(sum(fake_quant(x, h, z, s) * up)).contains(z));
        });
  }
}

}  // namespace omq
