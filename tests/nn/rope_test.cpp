// Rotary frequencies by their closed forms, and what a rotation keeps.
#include "nn/rope.h"

#include <doctest/doctest.h>

#include <cmath>
#include <numbers>

#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq::nn {

using Type = RopeScaling::Type;

TEST_CASE("plain frequencies fall geometrically from 1") {
  const auto f = rope_frequencies(8, 10000, {});
  REQUIRE(f.size() == 4);
  const double want[] = {1, 0.1, 0.01, 0.001};
  for (size_t i = 0; i < 4; ++i) CHECK(f[i] == doctest::Approx(want[i]).epsilon(1e-14));
}

TEST_CASE("linear scaling slows every frequency") {
  const auto plain = rope_frequencies(64, 5e5, {}),
             slow = rope_frequencies(64, 5e5, {.type = Type::Linear, .factor = 4});
  for (size_t i = 0; i < plain.size(); ++i)
    CHECK(slow[i] == doctest::Approx(plain[i] / 4).epsilon(1e-15));
}

TEST_CASE("Llama-3 scaling keeps short waves, slows long ones, blends between") {
  const RopeScaling s{.type = Type::Llama3,
                      .factor = 8,
                      .low_freq_factor = 1,
                      .high_freq_factor = 4,
                      .original_max_positions = 8192};
  const auto plain = rope_frequencies(128, 5e5, {}), scaled = rope_frequencies(128, 5e5, s);
  int kept = 0, slowed = 0, blended = 0;
  for (size_t i = 0; i < plain.size(); ++i) {
    const double wave = 2 * std::numbers::pi / plain[i];
    if (wave < 8192.0 / 4) {
      CHECK(scaled[i] == plain[i]);
      ++kept;
    } else if (wave > 8192.0) {
      CHECK(scaled[i] == plain[i] / 8);
      ++slowed;
    } else {
      const double smooth = (8192 / wave - 1) / 3;
      CHECK(scaled[i] ==
            doctest::Approx((1 - smooth) * plain[i] / 8 + smooth * plain[i]).epsilon(1e-14));
      CHECK(scaled[i] < plain[i]);
      CHECK(scaled[i] > plain[i] / 8);
      ++blended;
    }
    if (i > 0) CHECK(scaled[i] < scaled[i - 1]);
  }
  CHECK(kept > 0);
  CHECK(slowed > 0);
  CHECK(blended > 0);
}

TEST_CASE("divisors of a GGUF file divide, and must be as many as there are pairs") {
  const std::vector<float> by = {1, 2, 4, 8};
  const auto plain = rope_frequencies(8, 100, {}), divided = rope_frequencies(8, 100, {}, by);
  for (size_t i = 0; i < 4; ++i) CHECK(divided[i] == plain[i] / static_cast<double>(by[i]));
  CHECK_THROWS_WITH_AS(rope_frequencies(16, 100, {}, by),
                       "rope: 4 frequency divisors for a head of 16", Error);
}

TEST_CASE("tables hold the angle of every position") {
  const auto f = rope_frequencies(8, 1e4, {});
  const RopeTables wide = rope_tables(f, 3000, DType::F64), narrow = rope_tables(f, 3000);
  CHECK(narrow.cos.dtype() == DType::F32);
  CHECK(wide.sin.shape() == Dims{3000, 4});
  for (int64_t p : {0, 1, 17, 2999})
    for (int64_t i = 0; i < 4; ++i) {
      const double angle = static_cast<double>(p) * f[static_cast<size_t>(i)];
      CHECK(wide.cos.data<double>()[p * 4 + i] == std::cos(angle));
      CHECK(wide.sin.data<double>()[p * 4 + i] == std::sin(angle));
      CHECK(narrow.sin.data<float>()[p * 4 + i] ==
            static_cast<float>(std::sin(angle)));  // rounded once, late
    }
}

TEST_CASE("a rotation keeps lengths, and a dot product sees only the distance") {
  Rng rng(1);
  const RopeTables t = rope_tables(rope_frequencies(16, 1e4, {}), 128, DType::F64);
  const auto turned = [&](const Tensor& x, int32_t at) {
    return omq::rope(x, t.cos, t.sin, Tensor::from<int32_t>({at}, {1}));
  };
  const Tensor q = normal_tensor(rng, {1, 1, 1, 16}), k = normal_tensor(rng, {1, 1, 1, 16});
  const auto dot = [](const Tensor& a, const Tensor& b) { return sum(a * b).item<double>(); };
  CHECK(dot(turned(q, 77), turned(q, 77)) == doctest::Approx(dot(q, q)).epsilon(1e-13));
  CHECK(dot(turned(q, 9), turned(k, 4)) ==
        doctest::Approx(dot(turned(q, 105), turned(k, 100))).epsilon(1e-12));
  CHECK(bit_equal(turned(q, 0), q));
}

}  // namespace omq::nn
