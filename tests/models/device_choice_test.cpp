// Tokens drawn on a device are those that the Sampler draws from the same logits by the same
// numbers.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "models/decode_plan.h"
#include "models/generator.h"
#include "tensor/decode_kernels.h"
#include "tests/models/device_models.h"
#include "tests/support/property.h"

namespace omq {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TokenChoice choice_of(const SamplerOptions& o, int64_t vocabulary, Device d) {
  TokenChoice c{.top_k = o.top_k == 0 ? vocabulary : std::min(o.top_k, vocabulary),
                .top_p = o.top_p,
                .min_p = o.min_p,
                .temperature = o.temperature};
  std::vector<int32_t> ids;
  std::vector<float> bias;
  for (const auto& [id, by] : o.logit_bias)
    ids.push_back(id), bias.push_back(static_cast<float>(by));
  const auto n = static_cast<int64_t>(ids.size());
  if (n > 0) c.bias_ids = to(Tensor::from<int32_t>(ids, {n}), d);
  if (n > 0) c.bias = to(Tensor::from<float>(bias, {n}), d);
  return c;
}

// What the device chooses for each row of logits; row r stands at position 2 + r and has the first
// number of the Sampler with the seed o.seed + r.
std::vector<int32_t> chosen(const std::vector<float>& logits, int64_t rows, const SamplerOptions& o,
                            Device d) {
  const auto V = static_cast<int64_t>(logits.size()) / rows, positions = rows + 3;
  std::vector<double> numbers(static_cast<size_t>(rows * positions), 0.5);
  std::vector<int32_t> start(static_cast<size_t>(2 * rows), 0);
  for (int64_t r = 0; r < rows; ++r) {
    SamplerOptions own = o;
    own.seed += static_cast<uint64_t>(r);
    Sampler(own).take_numbers(
        std::span(numbers).subspan(static_cast<size_t>(r * positions + 2 + r), 1));
    start[static_cast<size_t>(rows + r)] = static_cast<int32_t>(2 + r);
  }
  TokenChoice by = choice_of(o, V, d);
  by.numbers = to(Tensor::from<double>(numbers, {rows, positions}), d);
  Tensor state = to(Tensor::from<int32_t>(start, {2, rows}), d);
  Tensor device_logits = to(Tensor::from<float>(logits, {rows, V}), d);
  Tensor told = empty_pinned({16 * rows}, DType::U8, d);
  decode_kernels(d)->choose(state, told, device_logits, by);
  device_api(d).sync(d.index);
  const auto after = state.to_vector<int32_t>();
  std::vector<int32_t> ids;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = 2 + r, word = static_cast<const int64_t*>(told.raw())[at % 2 * rows + r];
    CHECK((word >> 32) == at);
    ids.push_back(static_cast<int32_t>(word));
    CHECK(after[static_cast<size_t>(r)] == std::max(ids.back(), 0));
    CHECK(after[static_cast<size_t>(rows + r)] == at + 1);
  }
  return ids;
}

void check_drawn(const std::vector<float>& logits, int64_t rows, const SamplerOptions& o,
                 Device d) {
  const auto got = chosen(logits, rows, o, d);
  const size_t V = logits.size() / static_cast<size_t>(rows);
  for (size_t r = 0; r < got.size(); ++r) {
    SamplerOptions own = o;
    own.seed += r;
    CHECK(got[r] == Sampler(own).sample(std::span(logits).subspan(r * V, V), {}));
  }
}

std::vector<float> normal_logits(int64_t n, uint64_t seed, double deviation) {
  Rng rng(seed);
  return normal_tensor(rng, {n}, DType::F32, deviation).to_vector<float>();
}

// Devices that choose tokens.
template <class F> void for_choosing_devices(F&& body) {
  int found = 0;
  for (const Device d : test_devices()) {
    if (!decode_kernels(d)) continue;
    CAPTURE(d);
    body(d);
    ++found;
  }
  if (found == 0) MESSAGE("skipped: no device here chooses tokens by itself");
}

TEST_CASE("devices: tokens are drawn as the sampler draws them") {
  for_choosing_devices([](Device d) {
    for (const int64_t V : {1, 5, 131, 1000, 1025, 32000, 128256})
      for (const int64_t top_k : {1, 2, 40, 128})
        for (const auto& [top_p, min_p, temperature] :
             {std::array{0.95, 0.05, 0.8}, std::array{1.0, 0.0, 1.0}, std::array{0.5, 0.0, 3.0},
              std::array{1.0, 0.3, 0.1}}) {
          CAPTURE(V);
          CAPTURE(top_k);
          CAPTURE(temperature);
          SamplerOptions o{.temperature = temperature,
                           .top_k = top_k,
                           .top_p = top_p,
                           .min_p = min_p,
                           .logit_bias = {},
                           .seed = static_cast<uint64_t>(V + top_k)};
          const int64_t rows = V > 1000 ? 3 : 16;
          check_drawn(normal_logits(rows * V, o.seed, 3), rows, o, d);
          if (V < 100) continue;
          o.logit_bias = {{3, -kInfinity}, {17, 4.0}, {99, -2.5}};
          std::vector<float> biased = normal_logits(rows * V, o.seed + 1, 3);
          check_drawn(biased, rows, o, d);
        }
  });
}

// Rows in which a bound by groups of tokens lets many through, or few tokens are possible at all.
TEST_CASE("devices: tokens are drawn from rows of equal, crowded and forbidden logits") {
  for_choosing_devices([](Device d) {
    constexpr int64_t V = 40000;
    const SamplerOptions o{.temperature = 1, .top_k = 40, .top_p = 1, .min_p = 0, .logit_bias = {}};
    check_drawn(std::vector<float>(V, 0.25f), 1, o, d);
    std::vector<float> zeros(V, 0.0f);
    for (size_t i = 0; i < V; i += 3) zeros[i] = -0.0f;  // equal to 0
    check_drawn(zeros, 1, o, d);
    // The large ones in one group, 157 of them; and 6 000 in one group less than are wanted.
    for (const size_t groups : {1, 39}) {
      std::vector<float> crowded = normal_logits(V, groups, 1);
      for (size_t i = 0; i < V; ++i)
        if (i % 1024 < 4 * groups) crowded[i] += 100;
      check_drawn(crowded, 1, o, d);
    }
    std::vector<float> few(V, -std::numeric_limits<float>::infinity());
    CHECK(chosen(few, 1, o, d).front() == kChosenNothing);
    few[777] = -3;
    CHECK(chosen(few, 1, o, d).front() == 777);
    few[31000] = -3.5;
    check_drawn(few, 1, o, d);
    few[39999] = NAN;
    CHECK(chosen(few, 1, o, d).front() == kChosenNaN);
  });
}

TEST_CASE("devices: a sampled text is the one that its logits and the sampler give") {
  const auto form = Form{.bits = 4, .group = 32};
  const int64_t length = all_or_few(30, 8);
  for_random_writer(form, [&](Generator& generator, const Model& model, const auto& prompt) {
    GenerateOptions o = text_of(length, {});
    const auto text_by_logits = [&] {
      auto caches = model.new_caches(1, 64);
      DecodePlan plan(model, 64);
      SamplerOptions s = o.sampling;
      for (int32_t id = 0; id < model.config().vocab_size; ++id)
        if (generator.ends_text(id)) s.logit_bias.emplace_back(id, -kInfinity);
      Sampler sampler(s);
      const auto P = static_cast<int64_t>(prompt.size());
      const Tensor h = model.forward(Tensor::from<int32_t>(prompt, {1, P}), 0, &caches);
      const auto first = model.logits(slice(h, 1, P - 1, P)).to_vector<float>();
      std::vector<int32_t> tokens{sampler.sample(first, prompt)}, history = prompt;
      while (std::ssize(tokens) < length) {
        history.push_back(tokens.back());
        plan.step(tokens.back(), caches);
        tokens.push_back(sampler.sample(plan.logits(), history));
      }
      return tokens;
    };
    for (const double temperature : {0.0, 0.8, 1.5})
      for (const int64_t top_k : {40, 0})  // 0: all of them, which is more than a GPU draws from
        for (const double penalty : {1.0, 1.3}) {
          CAPTURE(temperature);
          CAPTURE(top_k);
          CAPTURE(penalty);
          o.sampling = {.temperature = temperature,
                        .top_k = top_k,
                        .repeat_penalty = penalty,
                        .logit_bias = {{7, 1.5}, {7, -0.5}},
                        .seed = 5};
          // The prompt anew: with one that is cached its last token alone is computed, by other
          // sums, and a number may fall on the other side of a boundary.
          const auto generated = [&] {
            generator.reset();
            return generator.generate(prompt, o).tokens;
          };
          const auto tokens = generated();
          CHECK(tokens == text_by_logits());
          CHECK(generated() == tokens);
          CHECK(generator.generate(prompt, o).tokens.size() == tokens.size());
        }
  });
}

TEST_CASE("devices: sampled continuations made together have their own numbers") {
  const auto form = Form{.bits = 8, .group = 32};
  for_random_writer(form, [](Generator& generator, const Model&, const auto& prompt) {
    GenerateOptions o = text_of(20, {.temperature = 1.2, .logit_bias = {}, .seed = 11});
    const auto all = generator.generate_parallel(prompt, 3, o);
    for (const GenerateResult& r : all) {
      CHECK(r.tokens.size() == 20);
      // Sums in another order: a number may fall on the other side of a boundary later on.
      const auto alone = generator.generate(prompt, o).tokens;
      CHECK(std::equal(r.tokens.begin(), r.tokens.begin() + 3, alone.begin()));
      ++o.sampling.seed;
    }
    CHECK(all[0].tokens != all[1].tokens);
  });
}

TEST_CASE("devices: a text of which every token is forbidden is an error") {
  for_random_model([](const CheckpointReader& reader, Device d) {
    Model model = Model::load(reader);
    model.move_to(d);
    const int64_t V = model.config().vocab_size;
    SamplerOptions none{.temperature = 0.7, .top_k = 10, .logit_bias = {}};
    for (int32_t id = 0; id < V; ++id) none.logit_bias.emplace_back(id, -kInfinity);
    auto caches = model.new_caches(1, 8);
    DecodePlan plan(model, 8);
    if (!plan.can_choose(none)) return;  // a CPU's plan leaves it to the sampler
    plan.choose_by(none, 0, std::vector<double>(8, 0.5));
    CHECK_THROWS_WITH_AS(plan.choose(1, caches),
                         "sampling: every token is forbidden; see --logit-bias", Error);
    CHECK(caches.front().length() == 0);
    // A bias beyond every float decides.
    plan.choose_by({.temperature = 1, .top_k = 40, .min_p = 0, .logit_bias = {{5, 1e39}}}, 0,
                   std::vector<double>(8, 0.999));
    CHECK(plan.choose(1, caches) == 5);
    for (nn::KVCache& cache : caches) cache.truncate(0);
    CHECK_THROWS_WITH_AS(
        plan.choose_by({.temperature = 1, .logit_bias = {{static_cast<int32_t>(V), 1}}}, 0, {}),
        doctest::Contains("is outside the vocabulary"), Error);
    plan.choose_by({.temperature = 0, .logit_bias = {}}, 0, {});
    CHECK(plan.choose(1, caches) >= 0);
    none.top_k = 0;
    CHECK(plan.can_choose(none) == (V <= kDecodeMostTopK));
  });
}

}  // namespace
}  // namespace omq
