// Numbers: every 16-bit pattern both ways, rounding at every midpoint, and the error of the fast
// exp.
#include "tensor/numeric.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace omq {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// x rounded to a multiple of `unit` (a power of two), half to even, in exact double arithmetic.
double rounded(double x, double unit) { return std::nearbyint(x / unit) * unit; }

// The spacing of values with p significand bits around x, never finer than `finest`.
double spacing(double x, int p, double finest) {
  return std::max(finest, std::ldexp(1.0, std::ilogb(x) - p + 1));
}

void check_against(double x, double via, int p, double finest, double limit) {
  double want = rounded(x, spacing(x, p, finest));
  if (std::abs(want) >= limit) want = std::copysign(static_cast<double>(kInf), x);
  if (via != want) FAIL_CHECK(fmt::format("{:a} gave {:a} instead of {:a}", x, via, want));
}

}  // namespace

TEST_CASE("every f16 pattern survives a trip through f32") {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto h = static_cast<uint16_t>(i);
    const float f = f16_bits_to_f32(h);
    const bool nan = (h & 0x7c00u) == 0x7c00u && (h & 0x3ffu) != 0;
    if (std::isnan(f) != nan) FAIL_CHECK("NaN: pattern " << i);
    const uint16_t back = f32_to_f16_bits(f);
    if (nan ? (back & 0x7e00u) != 0x7e00u : back != h)
      FAIL_CHECK("pattern " << i << " came back as " << back);
  }
  CHECK(f16_bits_to_f32(0x3c00) == 1.0f);
  CHECK(f16_bits_to_f32(0xc000) == -2.0f);
  CHECK(f16_bits_to_f32(0x7bff) == 65504.0f);
  CHECK(f16_bits_to_f32(0x0001) == 0x1p-24f);
  CHECK(f16_bits_to_f32(0x0400) == 0x1p-14f);
  CHECK(f16_bits_to_f32(0x7c00) == kInf);
  CHECK(std::signbit(f16_bits_to_f32(0x8000)));
}

TEST_CASE("every bf16 pattern survives a trip through f32") {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto h = static_cast<uint16_t>(i);
    const float f = bf16_bits_to_f32(h);
    const uint16_t back = f32_to_bf16_bits(f);
    if (std::isnan(f) ? (back & 0x7fc0u) != 0x7fc0u : back != h)
      FAIL_CHECK("pattern " << i << " came back as " << back);
  }
  CHECK(bf16_bits_to_f32(0x3f80) == 1.0f);
  CHECK(bf16_bits_to_f32(0xff80) == -kInf);
}

TEST_CASE("between two neighbours f16 and bf16 round to nearest, half to even") {
  for (uint32_t i = 0; i < 0x7c00; ++i) {  // all finite positive f16 and the step to the next one
    const double a = static_cast<double>(f16_bits_to_f32(static_cast<uint16_t>(i)));
    const double b =
        i == 0x7bff ? 65536.0 : static_cast<double>(f16_bits_to_f32(static_cast<uint16_t>(i + 1)));
    const auto middle = static_cast<float>((a + b) / 2);
    for (float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInf)})
      for (float sign : {1.0f, -1.0f})
        check_against(static_cast<double>(sign * x),
                      static_cast<double>(f16_bits_to_f32(f32_to_f16_bits(sign * x))), 11, 0x1p-24,
                      65536.0);
  }
  for (uint32_t i = 0; i < 0x7f80; ++i) {
    const uint32_t middle = (i << 16) | 0x8000u;
    for (uint32_t bits : {middle - 1, middle, middle + 1}) {
      const auto x = std::bit_cast<float>(bits);
      check_against(static_cast<double>(x),
                    static_cast<double>(bf16_bits_to_f32(f32_to_bf16_bits(x))), 8, 0x1p-133,
                    0x1p128);
    }
  }
}

TEST_CASE("infinities, NaN and values out of range") {
  CHECK(f32_to_f16_bits(kInf) == 0x7c00);
  CHECK(f32_to_f16_bits(-kInf) == 0xfc00);
  CHECK(f32_to_f16_bits(65519.996f) == 0x7bff);
  CHECK(f32_to_f16_bits(65520.0f) == 0x7c00);
  CHECK(f32_to_f16_bits(1e-8f) == 0);
  CHECK(f32_to_f16_bits(-1e-8f) == 0x8000);
  CHECK(f32_to_f16_bits(0x1p-25f) == 0);  // half of the smallest: to even
  CHECK(f32_to_f16_bits(std::nextafter(0x1p-25f, 1.0f)) == 1);
  CHECK(f32_to_bf16_bits(std::numeric_limits<float>::max()) == 0x7f80);
  // a NaN whose payload sits in the bits that are cut off stays a NaN
  for (uint32_t bits : {0x7f800001u, 0xff80ffffu, 0x7fffffffu}) {
    CHECK(std::isnan(f16_bits_to_f32(f32_to_f16_bits(std::bit_cast<float>(bits)))));
    CHECK(std::isnan(bf16_bits_to_f32(f32_to_bf16_bits(std::bit_cast<float>(bits)))));
  }
}

TEST_CASE("round_even goes to the even neighbour") {
  const double cases[][2] = {{0.5, 0},   {1.5, 2},   {2.5, 2},        {-0.5, 0},
                             {-1.5, -2}, {-2.5, -2}, {0.49999997, 0}, {7, 7}};
  for (auto [x, want] : cases) {
    CHECK(round_even(x) == want);
    CHECK(round_even(static_cast<float>(x)) == static_cast<float>(want));
  }
}

TEST_CASE("exp_fast in F32 is within 2e-7 of exp") {
  double worst = 0;
  float worst_at = 0;
  for (int i = 0; i <= 2'000'000; ++i) {
    const float x = -87.3f + 176.0f * static_cast<float>(i) / 2e6f;
    if (x > 88.72f) break;
    const double want = std::exp(static_cast<double>(x));
    const double error = std::abs(static_cast<double>(exp_fast(x)) - want) / want;
    if (!(error <= worst)) worst = error, worst_at = x;
  }
  CAPTURE(worst_at);
  CHECK(worst < 2e-7);
  CHECK(exp_fast(0.0f) == 1.0f);
  CHECK(exp_fast(-0.0f) == 1.0f);
  CHECK(exp_fast(-87.4f) == 0.0f);
  CHECK(exp_fast(-1e30f) == 0.0f);
  CHECK(exp_fast(-kInf) == 0.0f);
  CHECK(std::isfinite(exp_fast(88.72f)));
  CHECK(exp_fast(1e30f) > 3.3e38f);  // saturates just below the largest float
  CHECK(std::isnan(exp_fast(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace omq
