// Several sequences at once on every device present: each has the logits that it has alone, within
// the rounding of 16 bits.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "models/decode_plan.h"
#include "models/generator.h"
#include "tests/models/device_models.h"

namespace omq {

TEST_CASE("devices: a plan of several sequences gives each its own logits") {
  const NoGrad off;
  const int64_t kTokens = all_or_few(40, 4), kVocab = 131;
  for (const Device d : test_devices()) {
    CAPTURE(d);
    for (const int bits : {3, 4})
      for (const bool quantised : {false, true})
        for (const int64_t batch : {2, 3, 16}) {
          const std::string name = fmt::format("{}: {} sequences at {} bits{}", to_string(d), batch,
                                               bits, quantised ? " quantised" : "");
          SUBCASE(name.c_str()) {
            const ActivationSpec s = eight_bits(quantised);
            Model model = assembled(bits, 64, s, bits == 4);
            model.move_to(d);
            const std::vector<int32_t> text = some_ids(kTokens + 3 * batch, kVocab);
            DecodePlan together(model, kTokens, batch), alone(model, kTokens);
            auto caches = model.new_caches(batch, kTokens);
            std::vector<std::vector<float>> got(static_cast<size_t>(batch));
            std::vector<int32_t> ids(static_cast<size_t>(batch));
            for (size_t t = 0; t < static_cast<size_t>(kTokens); ++t) {
              for (size_t n = 0; n < ids.size(); ++n) ids[n] = text[t + 3 * n];
              together.step(ids, caches);
              const auto logits = together.logits();
              REQUIRE(logits.size() == ids.size() * static_cast<size_t>(kVocab));
              for (size_t n = 0; n < ids.size(); ++n) {
                const auto row = logits.subspan(n * kVocab, kVocab);
                got[n].insert(got[n].end(), row.begin(), row.end());
              }
            }
            for (size_t n = 0; n<ids.size(); n += ids.size()> 3 ? 5 : 1) {
              auto own = model.new_caches(1, kTokens);
              std::vector<double> all;
              for (size_t t = 0; t < static_cast<size_t>(kTokens); ++t) {
                alone.step(text[t + 3 * n], own);
                all.push_back(
                    difference(std::span(got[n]).subspan(t * kVocab, kVocab), alone.logits()));
              }
              std::sort(all.begin(), all.end());
              CHECK(all[all.size() / 2] < (quantised ? 0.05 : 2e-3));
              CHECK(all.back() < (quantised ? 0.2 : 1e-2));
            }
          }
        }
  }
}

TEST_CASE("devices: greedy steps of several sequences choose as their logits do") {
  for_random_model([](const CheckpointReader& reader, Device d) {
    Model model = loaded(reader, {.bits = 4, .group = 32});
    model.move_to(d);
    constexpr int64_t kCapacity = 24;
    for (const int64_t batch : {2, 5, 16}) {
      SUBCASE(fmt::format("{}: {} sequences", to_string(d), batch).c_str()) {
        auto caches = model.new_caches(batch, kCapacity),
             others = model.new_caches(batch, kCapacity);
        DecodePlan plan(model, kCapacity, batch), by_steps(model, kCapacity, batch);
        std::vector<int32_t> ids = some_ids(batch, model.config().vocab_size);
        const auto check_step = [&] {
          by_steps.step(ids, others);
          const auto logits = by_steps.logits();
          const auto V = static_cast<int64_t>(logits.size()) / batch;
          const auto chosen = plan.choose(ids, caches);
          for (size_t n = 0; n < ids.size(); ++n) {
            const auto row = logits.begin() + static_cast<int64_t>(n) * V;
            REQUIRE(chosen[n] == std::max_element(row, row + V) - row);
            ids[n] = chosen[n];
          }
        };
        for (int i = 0; i < 8; ++i) check_step();  // each was begun before it was asked for
        ids.back() = 7;                            // another token than the one that was chosen
        check_step();
        for (auto* of : {&caches, &others})
          for (nn::KVCache& cache : *of) cache.truncate(4);
        while (caches.front().length() < kCapacity) check_step();
        CHECK_THROWS_WITH_AS(plan.choose(ids, caches),
                             "context is full: 24 tokens cached, 1 more wanted, room for 24",
                             Error);
      }
    }
  });
}

TEST_CASE("devices: a logit that is no number stops all sequences") {
  for_random_model([](const CheckpointReader& reader, Device d) {
    Model model = Model::load(reader);
    model.ends.norm.weight = Tensor::full(model.ends.norm.weight.shape(), NAN, DType::F32);
    model.move_to(d);
    auto caches = model.new_caches(3, 8);
    DecodePlan plan(model, 8, 3);
    CHECK_THROWS_WITH_AS(plan.choose(std::vector<int32_t>{1, 2, 3}, caches),
                         "decode: a logit behind token 1 at position 0 is NaN", Error);
    CHECK(caches.front().length() == 0);
  });
}

TEST_CASE("devices: continuations made together are those of one") {
  const auto form = Form{.bits = 8, .group = 32};
  for_random_writer(form, [](Generator& generator, const Model&, const auto& prompt) {
    const GenerateOptions o = text_of(20, {.temperature = 0, .logit_bias = {}});
    const auto all = generator.generate_parallel(prompt, 3, o);
    for (const GenerateResult& r : all) {
      CHECK(r.tokens.size() == 20);
      CHECK(r.tokens == all.front().tokens);
      // Sums in another order: a near tie may fall the other way later on, the first tokens hardly.
      CHECK(std::equal(r.tokens.begin(), r.tokens.begin() + 3,
                       generator.generate(prompt, o).tokens.begin()));
    }
  });
}

}  // namespace omq
