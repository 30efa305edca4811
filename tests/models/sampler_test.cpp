// The sampling chain: each link alone, their order, and the random numbers.
#include "models/sampler.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "tensor/error.h"

namespace omq {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Keeps everything, temperature 1.
SamplerOptions plain() {
  SamplerOptions o;
  o.temperature = 1.0;
  o.top_k = 0;
  o.top_p = 1.0;
  o.min_p = 0.0;
  return o;
}

std::vector<int32_t> ids_of(const std::vector<Candidate>& list) {
  std::vector<int32_t> ids;
  for (const Candidate& c : list) ids.push_back(c.id);
  return ids;
}

std::string message_of(const SamplerOptions& o) {
  try {
    o.validate(10);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1, not in order.
const std::vector<float> kHalves = {std::log(0.125f), std::log(0.5f), std::log(0.125f),
                                    std::log(0.25f)};
using Ids = std::vector<int32_t>;

TEST_CASE("temperature 0 is the largest logit, the lowest id on ties") {
  SamplerOptions o;
  o.temperature = 0;
  Sampler s(o);
  CHECK(s.sample(std::vector<float>{1, 3, 2, 3}, {}) == 1);
  CHECK(s.sample(std::vector<float>{-5, -7}, {}) == 0);
  CHECK(s.candidates(std::vector<float>{0, 0, 0}, {}).size() == 1);
}

TEST_CASE("top-k, top-p and min-p keep what they say, ties by id") {
  SamplerOptions o = plain();
  CHECK(ids_of(Sampler(o).candidates(kHalves, {})) == Ids{1, 3, 0, 2});
  o.top_k = 3;
  CHECK(ids_of(Sampler(o).candidates(kHalves, {})) == Ids{1, 3, 0});
  o = plain();
  o.top_p = 0.74;
  CHECK(ids_of(Sampler(o).candidates(kHalves, {})) == Ids{1, 3});
  o.top_p = 0.3;
  CHECK(ids_of(Sampler(o).candidates(kHalves, {})) == Ids{1});
  o = plain();
  o.min_p = 0.3;  // at least 0.15
  CHECK(ids_of(Sampler(o).candidates(kHalves, {})) == Ids{1, 3});
}

TEST_CASE("temperature comes last and reweighs what is left") {
  SamplerOptions o = plain();
  o.top_p = 0.74;  // 0.5 and 0.25 at temperature 1; at 0.5 the first alone would do
  o.temperature = 0.5;
  const auto list = Sampler(o).candidates(kHalves, {});
  REQUIRE(ids_of(list) == Ids{1, 3});
  CHECK(list[0].probability == doctest::Approx(0.8));  // 0.5² to 0.25²
  CHECK(list[1].probability == doctest::Approx(0.2));
}

TEST_CASE("penalties look back over the last tokens") {
  SamplerOptions o = plain();
  o.repeat_penalty = 2.0;
  o.presence_penalty = 0.5;
  o.frequency_penalty = 0.25;
  o.repeat_last_n = 3;
  const std::vector<float> logits = {4, -4, 3, 1};
  const Ids history = {3, 0, 1, 0};  // 3 is too long ago
  std::map<int32_t, double> after;
  for (const Candidate& c : Sampler(o).candidates(logits, history)) after[c.id] = c.logit;
  CHECK(after[0] == doctest::Approx(2 - 0.5 - 0.5));
  CHECK(after[1] == doctest::Approx(-8 - 0.5 - 0.25));
  CHECK(after[2] == 3);
  CHECK(after[3] == 1);
  o.repeat_last_n = -1;
  for (const Candidate& c : Sampler(o).candidates(logits, history)) after[c.id] = c.logit;
  CHECK(after[3] == doctest::Approx(0.5 - 0.5 - 0.25));
  o.repeat_last_n = 0;
  for (const Candidate& c : Sampler(o).candidates(logits, history)) after[c.id] = c.logit;
  CHECK(after[0] == 4);
}

TEST_CASE("bias moves and forbids tokens") {
  SamplerOptions o;
  o.temperature = 0;
  o.logit_bias = {{1, 5.0}};
  CHECK(Sampler(o).sample(std::vector<float>{3, 0, 1}, {}) == 1);
  o.logit_bias = {{0, -kInfinity}};
  CHECK(Sampler(o).sample(std::vector<float>{3, 0, 1}, {}) == 2);
  o.temperature = 1;
  CHECK(Sampler(o).candidates(std::vector<float>{3, 0, 1}, {}).size() == 2);
  o.logit_bias = {{0, -kInfinity}, {1, -kInfinity}};
  CHECK_THROWS_WITH_AS(Sampler(o).sample(std::vector<float>{1, 2}, {}),
                       "sampling: every token is forbidden; see --logit-bias", Error);
}

TEST_CASE("NaN logits are an error that names the token") {
  CHECK_THROWS_WITH_AS(Sampler({}).sample(std::vector<float>{0, std::nanf("")}, {}),
                       "sampling: the logit of token 1 is NaN; the model's weights are broken",
                       Error);
}

TEST_CASE("random numbers: the published sequence, one seed one text") {
  // splitmix64 from 0 fills the state; xoshiro256++ as its authors publish it.
  Xoshiro256 random(0);
  CHECK(random.next() == 0x53175d61490b23dfu);
  CHECK(random.next() == 0x61da6f3dc380d507u);
  CHECK(random.next() == 0x5c0fdf91ec9a7bfcu);

  auto draws = [](uint64_t seed) {
    SamplerOptions o = plain();
    o.seed = seed;
    Sampler s(o);
    Ids ids;
    for (int i = 0; i < 50; ++i) ids.push_back(s.sample(kHalves, {}));
    return ids;
  };
  CHECK(draws(7) == draws(7));
  CHECK(draws(7) != draws(8));
}

TEST_CASE("draws follow the probabilities") {
  SamplerOptions o = plain();
  o.seed = 3;
  Sampler s(o);
  std::vector<int> counts(4);
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) ++counts[static_cast<size_t>(s.sample(kHalves, {}))];
  for (size_t i = 0; i < 4; ++i) {
    const double p = std::exp(kHalves[i]), sigma = std::sqrt(p * (1 - p) / kDraws);
    CHECK(std::abs(counts[i] / double{kDraws} - p) < 4 * sigma);
  }
}

TEST_CASE("options out of range are named") {
  SamplerOptions o;
  CHECK(message_of(o) == "");
  o.temperature = -1;
  CHECK(message_of(o) == "--temp -1 is outside 0…1000");
  o = {};
  o.temperature = std::nan("");
  CHECK(message_of(o) == "--temp nan is outside 0…1000");
  o = {};
  o.top_p = 0;
  CHECK(message_of(o) == "--top-p 0 is outside (0, 1]");
  o = {};
  o.repeat_penalty = 0;
  CHECK(message_of(o) == "--repeat-penalty 0 is outside (0, 1000]");
  o = {};
  o.logit_bias = {{10, 1.0}};
  CHECK(message_of(o) == "--logit-bias: token 10 is outside the vocabulary of 10");
}

}  // namespace
}  // namespace omq
