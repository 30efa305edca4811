// Attention behind which there is no gradient: an instruction set's own way gives what the F32
// products give.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "tensor/isa.h"
#include "tensor/kernels.h"
#include "tensor/parallel.h"
#include "tests/support/restore.h"

namespace omq {
namespace {

Tensor random(Shape shape, unsigned seed, float size) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, size);
  Tensor x = Tensor::empty(shape, DType::F32);
  for (int64_t i = 0; i < x.numel(); ++i) x.data<float>()[i] = normal(rng);
  return x;
}

struct Result {
  Tensor y, lse;
};
Result attend(const Tensor& q, const Tensor& k, const Tensor& v, AttentionSpec s) {
  Result r{Tensor::full(q.shape(), std::nan("")),
           Tensor::full({q.dim(0), q.dim(2), q.dim(1)}, std::nan(""))};
  cpu::attention(r.y, r.lse, q, k, v, s);
  return r;
}
double farthest(const Tensor& a, const Tensor& b) {
  double worst = 0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    const double d = std::abs(double{a.data<float>()[i]} - double{b.data<float>()[i]});
    if (!(d <= worst)) worst = d;  // NaN counts
  }
  return worst;
}

struct Case {
  int64_t B, T, S, H, K, d;
  bool causal;
};
constexpr Case kCases[] = {{1, 70, 70, 4, 2, 64, true},
                           {2, 33, 130, 2, 1, 32, true},
                           {1, 32, 64, 3, 3, 96, false},
                           {1, 64, 97, 8, 1, 128, true},
                           {1, 130, 130, 1, 1, 64, false}};

TEST_CASE("prompts: attention without a gradient is attention, on every instruction set") {
  Restore restore;
  for (const auto& c : kCases) {
    const Tensor q = random({c.B, c.T, c.H, c.d}, 1, 1.5f), k = random({c.B, c.S, c.K, c.d}, 2, 1),
                 v = random({c.B, c.S, c.K, c.d}, 3, 1);
    const AttentionSpec learns{.scale = 1.0 / std::sqrt(static_cast<double>(c.d)),
                               .causal = c.causal};
    AttentionSpec free = learns;
    free.learns = false;
    const Result want = attend(q, k, v, learns);
    for (const char* name : packed_isas_here()) {
      REQUIRE(force_packed_isa(name));
      CAPTURE(name);
      CAPTURE(c.T);
      CAPTURE(c.S);
      CAPTURE(c.d);
      const Result got = attend(q, k, v, free);
      CHECK(farthest(got.y, want.y) < 6e-5);
      CHECK(farthest(got.lse, want.lse) < 6e-5);
      for (int threads : {1, 3}) {
        set_num_threads(threads);
        CHECK(std::memcmp(attend(q, k, v, free).y.raw(), got.y.raw(), got.y.nbytes()) == 0);
      }
    }
  }
}

TEST_CASE(
    "prompts: heads lie apart, large scores are exact, a query that is no number stays alone") {
  Restore restore;
  constexpr int64_t kT = 64, kD = 32;
  // One projection's rows, q, k and v side by side.
  const Tensor all = random({1, kT, 3, kD}, 4, 1);
  Tensor q = all.alias({1, kT, 1, kD}, {kT * 3 * kD, 3 * kD, kD, 1}, 0),
         k = all.alias({1, kT, 1, kD}, {kT * 3 * kD, 3 * kD, kD, 1}, kD),
         v = all.alias({1, kT, 1, kD}, {kT * 3 * kD, 3 * kD, kD, 1}, 2 * kD);
  // Query 40 finds its own key alone: scores of 3e4 there and of less elsewhere.
  for (int64_t i = 0; i < kD; ++i)
    q.data<float>()[40 * 3 * kD + i] = 1e3f * k.data<float>()[40 * 3 * kD + i];
  q.data<float>()[50 * 3 * kD] = std::numeric_limits<float>::quiet_NaN();
  const auto attend_packed = [&](AttentionSpec s) {
    Result r{Tensor::full({1, kT, 1, kD}, 7), Tensor::full({1, 1, kT}, 7)};
    cpu::attention(r.y, r.lse, q, k, v, s);
    return r;
  };
  const Result want = attend_packed({.scale = 1.0});
  for (const char* name : packed_isas_here()) {
    REQUIRE(force_packed_isa(name));
    CAPTURE(name);
    const Result got = attend_packed({.scale = 1.0, .learns = false});
    bool near = true, own = true, none = true;
    for (int64_t t = 0; t < kT; ++t)
      for (int64_t i = 0; i < kD; ++i) {
        const float a = got.y.data<float>()[t * kD + i], b = want.y.data<float>()[t * kD + i];
        if (t == 50)
          none = none && std::isnan(a);
        else
          near = near && std::abs(a - b) < 2e-4f;
        if (t == 40) own = own && std::abs(a - v.data<float>()[40 * 3 * kD + i]) < 1e-4f;
      }
    CHECK(near);
    CHECK(own);
    CHECK(none);
  }
}

}  // namespace
}  // namespace omq
