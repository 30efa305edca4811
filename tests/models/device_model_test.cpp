// Models on every device present: the blocks and the recorded plan give the CPU's logits within the
// rounding of 16 bits.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "autograd/compute.h"
#include "autograd/ops.h"
#include "models/decode_plan.h"
#include "models/packed_model.h"
#include "quant/calibrate.h"
#include "tests/models/device_models.h"
#include "tests/models/files.h"
#include "tests/support/devices.h"
#include "tests/support/random_model.h"
#include "tests/support/shared.h"

namespace omq {

namespace {

// The plan's logits behind a prompt of ids[0, first), step by step to ids[last − 1]: each one's
// difference from row t of `want` [ids, V].
std::vector<double> step_differences(const Model& m, DecodePlan& plan, int64_t capacity,
                                     std::span<const int32_t> ids, std::span<const float> want,
                                     size_t first, size_t last) {
  auto caches = m.new_caches(1, capacity);
  if (first > 0)
    m.forward(Tensor::from<int32_t>(ids.first(first), {1, static_cast<int64_t>(first)}), 0,
              &caches);
  const auto vocab = static_cast<size_t>(m.config().vocab_size);
  std::vector<double> all;
  for (size_t t = first; t < last; ++t) {
    plan.step(ids[t], caches);
    all.push_back(difference(plan.logits(), want.subspan(t * vocab, vocab)));
  }
  CHECK(caches.front().length() == static_cast<int64_t>(last));
  return all;
}

// In one pass and token by token, against the CPU's in one pass.
void check_logits(const CheckpointReader& reader, const Form& f, Device d) {
  CAPTURE(d);
  const Model cpu = loaded(reader, f);
  Model gpu = loaded(reader, f);
  gpu.move_to(d);
  // An 8-bit code of a row can fall the other way.
  const double bound = f.activations.activation < 16 ? 0.05 : 5e-3;
  constexpr int64_t kTokens = 90;
  const std::vector<int32_t> ids = some_ids(kTokens, cpu.config().vocab_size);
  const Tensor all = Tensor::from<int32_t>(ids, {1, kTokens});
  const std::vector<float> want = cpu.logits(cpu.forward(all)).to_vector<float>();
  const std::vector<float> got = gpu.logits(gpu.forward(all)).to_vector<float>();
  CHECK(difference(got, want) < bound);
  CHECK(DecodePlan::unsupported(gpu) == "");
  DecodePlan plan(gpu, kTokens);
  for (const size_t first : {0, 30, 84})
    for (const double each : step_differences(gpu, plan, kTokens, ids, want, first, first + 6))
      CHECK(each < bound);
}

}  // namespace

TEST_CASE("devices: a model's logits, in one pass and token by token") {
  const NoGrad off;
  TempDir dir;
  const Form forms[] = {{},
                        {.table = 0},
                        {.bits = 8, .group = 32},
                        {.bits = 4, .group = 32},
                        {.bits = 4},
                        {.bits = 3, .group = 32, .table = 4},
                        {.bits = 2, .group = 32},
                        {.bits = 8, .activations = {.activation = 8, .q = 8, .k = 8, .v = 8}}};
  for (const char* type : {"llama", "qwen2"}) {
    const bool tied = std::string(type) == "llama";
    write_random_model(dir / type, {.type = type, .tied = tied});
    const auto reader = open_checkpoint(dir / type);
    for (const Device d : test_devices()) {
      if (d.type == DeviceType::CPU) continue;
      for (const Form& f : forms) {
        const std::string name =
            fmt::format("{}: {}: {} bits in groups of {}; table {}; x {}", to_string(d), type,
                        f.bits, f.group, f.table, f.activations.activation);
        SUBCASE(name.c_str()) { check_logits(*reader, f, d); }
      }
    }
  }
}

TEST_CASE("devices: a plan gives the CPU's logits at every width") {
  const NoGrad off;
  constexpr int64_t kTokens = 200;
  for (const Device d : test_devices()) {
    if (d.type == DeviceType::CPU) continue;
    CAPTURE(d);
    for (const int bits : {2, 3, 4, 8})
      for (const int64_t group : {0, 64})
        for (const bool quantised : {false, true}) {
          const std::string name = fmt::format("{}: {} bits in groups of {}{}", to_string(d), bits,
                                               group, quantised ? " quantised" : "");
          SUBCASE(name.c_str()) {
            const ActivationSpec s = eight_bits(quantised);
            const Model cpu = assembled(bits, group, s, bits == 4);
            Model gpu = assembled(bits, group, s, bits == 4);
            gpu.move_to(d);
            const std::vector<int32_t> ids = some_ids(kTokens, 131);
            const std::vector<float> want =
                cpu.logits(cpu.forward(Tensor::from<int32_t>(ids, {1, kTokens})))
                    .to_vector<float>();
            DecodePlan plan(gpu, 224);  // in seven parts, of which one to all have tokens
            std::vector<double> all;
            for (const size_t first : {0, 30, 62, 125, 194})
              for (const double each :
                   step_differences(gpu, plan, 224, ids, want, first,
                                    first + static_cast<size_t>(all_or_few(6, 3))))
                all.push_back(each);
            std::sort(all.begin(), all.end());
            CHECK(all[all.size() / 2] < (quantised ? 0.05 : 2e-3));
            CHECK(all.back() < (quantised ? 0.2 : 1e-2));
          }
        }
  }
}

TEST_CASE("devices: a plan over caches of codes gives the CPU's logits") {
  const NoGrad off;
  constexpr int64_t kTokens = 100, kVocab = 131;
  const std::vector<int32_t> ids = some_ids(kTokens, kVocab);
  for (const Device d : test_devices()) {
    if (d.type == DeviceType::CPU) continue;
    CAPTURE(d);
    for (const int bits : {4, 8}) {
      const std::string name = fmt::format("{}: caches of {} bits", to_string(d), bits);
      SUBCASE(name.c_str()) {
        Model cpu = assembled(8, 64, {}, false), gpu = assembled(8, 64, {}, false);
        cpu.kept.k = cpu.kept.v = gpu.kept.k = gpu.kept.v = RowQuant{.bits = bits};
        gpu.move_to(d);
        CHECK(gpu.new_caches(1, 4).front().quant().k == cpu.kept.k);
        DecodePlan plan(gpu, kTokens), on_cpu(cpu, kTokens);
        std::vector<float> want;
        auto caches = cpu.new_caches(1, kTokens);
        for (const int32_t id : ids) {
          on_cpu.step(id, caches);
          const auto logits = on_cpu.logits();
          want.insert(want.end(), logits.begin(), logits.end());
        }
        std::vector<double> all;
        for (const size_t first : {0, 40, 90})
          for (const double each :
               step_differences(gpu, plan, kTokens, ids, want, first, first + 10))
            all.push_back(each);
        std::sort(all.begin(), all.end());
        // A code may fall the other way, and one of four bits is a fifteenth of the range.
        CHECK(all[all.size() / 2] < (bits == 4 ? 0.06 : 5e-3));
        CHECK(all.back() < (bits == 4 ? 0.2 : 2e-2));
      }
    }
  }
}

TEST_CASE("devices: a plan sees that caches are others, and refuses larger ones") {
  const NoGrad off;
  Model model = assembled(8, 64, {}, false);
  for (const Device d : test_devices()) {
    CAPTURE(d);
    model.move_to(d);
    DecodePlan plan(model, 64), other(model, 64);
    for (const int64_t capacity : {8, 64, 16}) {  // in one place, one after the other
      auto caches = model.new_caches(1, capacity), again = model.new_caches(1, capacity);
      for (int32_t i = 0; i < 8; ++i) {
        plan.step(i + 3, caches);
        other.step(i + 3, again);
      }
      CHECK(std::ranges::equal(plan.logits(), other.logits()));
    }
    // Caches that move: the step that chooses is recorded only afterwards.
    auto gone = std::make_unique<std::vector<nn::KVCache>>(model.new_caches(1, 16));
    auto again = model.new_caches(1, 16);
    plan.step(3, *gone);
    other.step(3, again);
    std::vector<nn::KVCache> moved = std::move(*gone);
    gone.reset();
    CHECK(plan.choose(4, moved) == other.choose(4, again));
    auto large = model.new_caches(1, 65);
    CHECK_THROWS_WITH_AS(plan.step(3, large),
                         "decode: caches of 65 tokens, the plan was made for 64", Error);
  }
}

TEST_CASE("devices: caches that a GPU's plan could not read are floats there") {
  const NoGrad off;
  Model model = assembled(8, 64, {}, false);
  model.kept = {.k = RowQuant{.bits = 8}, .v = RowQuant{.bits = 4}};
  for (const Device d : test_devices()) {
    CAPTURE(d);
    model.move_to(d);
    auto caches = model.new_caches(1, 8);
    CHECK(caches.front().quant().any() == (d.type == DeviceType::CPU));
    DecodePlan plan(model, 8);
    plan.step(5, caches);
    CHECK(std::isfinite(plan.logits()[0]));
  }
}

TEST_CASE("devices: a plan goes on behind a prompt, and after a truncated cache") {
  for_random_model([](const CheckpointReader& reader, Device d) {
    Model model = loaded(reader, {.bits = 4, .group = 32});
    model.move_to(d);
    const std::vector<int32_t> ids = some_ids(40, model.config().vocab_size);
    auto caches = model.new_caches(1, 64);
    DecodePlan plan(model, 64);
    const auto after = [&](size_t tokens) {
      plan.step(ids[tokens], caches);
      const auto l = plan.logits();
      return std::vector<float>(l.begin(), l.end());
    };
    model.forward(Tensor::from<int32_t>(std::span(ids).first(30), {1, 30}), 0, &caches);
    const std::vector<float> first = after(30);
    after(31);
    for (nn::KVCache& cache : caches) cache.truncate(30);
    CHECK(after(30) == first);
  });
}

TEST_CASE("devices: greedy steps choose as their logits do") {
  for_random_model([](const CheckpointReader& reader, Device d) {
    Model model = loaded(reader, {.bits = 4, .group = 32});
    model.move_to(d);
    constexpr int64_t kCapacity = 24;
    auto caches = model.new_caches(1, kCapacity), others = model.new_caches(1, kCapacity);
    DecodePlan plan(model, kCapacity), by_steps(model, kCapacity);
    const auto largest_after = [&](int32_t token) {
      by_steps.step(token, others);
      const auto l = by_steps.logits();
      return static_cast<int32_t>(std::max_element(l.begin(), l.end()) - l.begin());
    };
    int32_t token = 3;
    for (int i = 0; i < 10; ++i) {  // each step was begun before it was asked for
      const int32_t next = plan.choose(token, caches);
      REQUIRE(next == largest_after(token));
      token = next;
    }
    // Another token than the one that was chosen, then an earlier place, then steps without choice.
    CHECK(plan.choose(7, caches) == largest_after(7));
    for (nn::KVCache& cache : caches) cache.truncate(4);
    for (nn::KVCache& cache : others) cache.truncate(4);
    CHECK(plan.choose(9, caches) == largest_after(9));
    // The place and the token of the step ahead, behind another text.
    const int32_t chosen = plan.choose(11, caches);
    CHECK(chosen == largest_after(11));
    const std::vector<int32_t> other = some_ids(6, model.config().vocab_size);
    for (auto* of : {&caches, &others}) {
      for (nn::KVCache& cache : *of) cache.truncate(0);
      model.forward(Tensor::from<int32_t>(other, {1, 6}), 0, of);
    }
    CHECK(plan.choose(chosen, caches) == largest_after(chosen));
    plan.step(2, caches);
    by_steps.step(2, others);
    const auto a = plan.logits(), b = by_steps.logits();
    CHECK(std::equal(a.begin(), a.end(), b.begin(), b.end()));
    while (caches.front().length() < kCapacity) {  // to the last place of the caches
      const int32_t next = plan.choose(token, caches);
      REQUIRE(next == largest_after(token));
      token = next;
    }
    CHECK_THROWS_WITH_AS(plan.choose(token, caches),
                         "context is full: 24 tokens cached, 1 more wanted, room for 24", Error);
  });
}

TEST_CASE("devices: a logit that is no number is an error, not a token") {
  for_random_model([](const CheckpointReader& reader, Device d) {
    Model model = Model::load(reader);
    Tensor gain = Tensor::full(model.ends.norm.weight.shape(), NAN, DType::F32);
    model.ends.norm.weight = gain;
    model.move_to(d);
    auto caches = model.new_caches(1, 8);
    DecodePlan plan(model, 8);
    CHECK_THROWS_WITH_AS(plan.choose(1, caches),
                         "decode: a logit behind token 1 at position 0 is NaN", Error);
    CHECK(caches.front().length() == 0);
  });
}

TEST_CASE("devices: the kernels of the oldest supported GPUs give the same logits") {
  for_random_model([](const CheckpointReader& reader, Device d) {
    Model model = loaded(reader, {.bits = 4, .group = 32});
    model.move_to(d);
    const std::vector<int32_t> ids = some_ids(24, model.config().vocab_size);
    const auto run = [&] {
      auto caches = model.new_caches(1, 32);
      DecodePlan plan(model, 32);
      std::vector<float> all =
          model.logits(model.forward(Tensor::from<int32_t>(ids, {1, 24}))).to_vector<float>();
      for (const int32_t id : ids) {
        plan.step(id, caches);
        const auto l = plan.logits();
        all.insert(all.end(), l.begin(), l.end());
      }
      return all;
    };
    const std::vector<float> usual = run();
    const PlainPath plain(d);
    CHECK(difference(run(), usual) < 1e-5);
  });
}

namespace {

constexpr const char* kText =
    "The history of the lighthouse begins with a fire on a hill. Ships that came home at night "
    "looked for it, and a village grew around the people who kept it burning. Later the fire was "
    "put into an iron basket, then behind glass, and in 1823 a French engineer found that rings of "
    "prisms could gather the light of one lamp and send it out over twenty miles of sea. Every "
    "coast of Europe wanted such lenses. They were ground by hand, carried over mountains in boxes "
    "of straw, and put together at the top of towers that had been built for them. A keeper wound "
    "the clockwork twice a night, trimmed the wick, and wrote the weather into a book. Most of "
    "these books still exist. They tell of storms and of birds that flew against the glass, of "
    "fishermen who were late, of visitors, of paint, of oil that did not arrive in time, and, on "
    "almost every page, that nothing happened.";

struct Scores {  // of every token but the first, and what the model would have said
  double loss = 0;
  std::vector<size_t> best;
  std::vector<double> lead;  // of the best over the second best
};

Scores scores(std::span<const float> logits, std::span<const int32_t> ids) {
  const size_t V = logits.size() / ids.size();
  Scores s;
  for (size_t t = 0; t + 1 < ids.size(); ++t) {
    const auto row = logits.subspan(t * V, V);
    const size_t best = static_cast<size_t>(std::max_element(row.begin(), row.end()) - row.begin());
    double sum = 0, second = -INFINITY;
    for (size_t i = 0; i < V; ++i) {
      sum += std::exp(static_cast<double>(row[i]) - static_cast<double>(row[best]));
      if (i != best) second = std::max(second, static_cast<double>(row[i]));
    }
    s.loss += std::log(sum) + static_cast<double>(row[best]) -
              static_cast<double>(row[static_cast<size_t>(ids[t + 1])]);
    s.best.push_back(best);
    s.lead.push_back(static_cast<double>(row[best]) - second);
  }
  s.loss /= static_cast<double>(ids.size() - 1);
  return s;
}

}  // namespace

TEST_CASE("devices: slow: SmolLM2 at every width says what it says on the CPU") {
  const NoGrad off;
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: no SmolLM2 (make smollm2)");
    return;
  }
  const auto reader = open_checkpoint(*file);
  const std::vector<int32_t> ids = reader->tokenizer().encode(kText);
  const auto n = static_cast<int64_t>(ids.size());
  for (const Device d : test_devices()) {
    if (d.type == DeviceType::CPU) continue;
    for (const int bits : {2, 3, 4, 8}) {
      CAPTURE(bits);
      const Form form{.bits = bits, .group = 64};
      const Model cpu = loaded(*reader, form);
      Model gpu = loaded(*reader, form);
      gpu.move_to(d);
      const Tensor all = Tensor::from<int32_t>(ids, {1, n});
      const Scores want = scores(cpu.logits(cpu.forward(all)).to_vector<float>(), ids),
                   got = scores(gpu.logits(gpu.forward(all)).to_vector<float>(), ids);
      // Two bits by rounding alone are no model (its loss is above that of guessing): a difference
      // grows on its way through it, and what it would say is not compared.
      const double relative = std::abs(std::exp(got.loss - want.loss) - 1);
      MESSAGE(bits << " bits: loss " << want.loss << ", perplexities " << relative << " apart");
      CHECK(relative < (bits == 2 ? 0.05 : 1e-3));
      DecodePlan plan(gpu, n);
      auto caches = gpu.new_caches(1, n);
      std::vector<float> steps;
      for (const int32_t id : ids) {
        plan.step(id, caches);
        const auto l = plan.logits();
        steps.insert(steps.end(), l.begin(), l.end());
      }
      const Scores planned = scores(steps, ids);
      for (size_t t = 0; t < want.best.size(); ++t) {
        if (bits == 2 || want.lead[t] <= 0.1) continue;
        CAPTURE(t);
        CHECK(got.best[t] == want.best[t]);
        CHECK(planned.best[t] == want.best[t]);
      }
    }
  }
}

TEST_CASE("devices: products without gradients in every compute type") {
  const NoGrad off;
  Rng rng(3);
  for (const Device d : test_devices())
    for (const Compute compute : {Compute::F32, Compute::BF16, Compute::F16})
      for (const DType type : {DType::F32, DType::BF16, DType::F16, DType::U8})
        for (const int64_t rows : {3, 40}) {
          CAPTURE(d);
          CAPTURE(std::string(compute_name(compute)));
          CAPTURE(rows);
          const Tensor w = normal_tensor(rng, {48, 64}, DType::F32),
                       x = normal_tensor(rng, {1, rows, 64}, DType::F32);
          nn::Linear l{w, {}};
          if (type == DType::U8) {  // packed
            const auto packed = quant::pack_nearest(w, {.wbits = 8, .group_size = 32});
            l.weight = d.type == DeviceType::CPU ? packed : packed->on_device(d);
          } else {
            l.weight = to(to(w, type), d);
          }
          const std::vector<float> want = omq::linear(x, w, {}).to_vector<float>();
          const ComputeScope scope(compute);
          const Tensor y = l(to(x, d), WriteAs::Operand);
          CHECK(difference(to(to(y, DType::F32), Device{}).to_vector<float>(), want) < 0.02);
        }
}

// On a GPU the sums of gate and up become one tensor at once, where both multiply codes of one
// kind.
TEST_CASE("devices: an MLP of codes is the CPU's") {
  const NoGrad off;
  Rng rng(4);
  const Tensor narrow = normal_tensor(rng, {48, 64}, DType::F32),
               wide = normal_tensor(rng, {48, 64}, DType::F32),
               back = normal_tensor(rng, {64, 48}, DType::F32),
               x = normal_tensor(rng, {1, 40, 64}, DType::F32);
  const auto mlp = [&](Device d) {
    nn::MLP m;
    const auto packed = [&](const Tensor& w) {
      const auto p = quant::pack_nearest(w, {.wbits = 8});
      return nn::Linear{d.type == DeviceType::CPU ? p : p->on_device(d), {}};
    };
    m.gate_proj = packed(narrow), m.up_proj = packed(wide), m.down_proj = packed(back);
    for (nn::Linear* l : {&m.gate_proj, &m.up_proj, &m.down_proj})
      l->input_quant = RowQuant{.bits = 8};
    return m;
  };
  const std::vector<float> want = mlp({})(x).to_vector<float>();
  for (const Device d : test_devices())
    for (const Compute compute : {Compute::F32, Compute::F16})
      for (const bool apart : {false, true}) {
        CAPTURE(d);
        CAPTURE(std::string(compute_name(compute)));
        CAPTURE(apart);
        nn::MLP m = mlp(d);
        if (apart)  // an onlooker wants each product by itself
          m.up_proj.pre = [](const Tensor& t) { return t; };
        const ComputeScope scope(compute);
        const Tensor on_device = to(x, d);
        const bool at_once =
            nn::gated_product(m.gate_proj, m.up_proj, nn::LinearInput(on_device)).defined();
        CHECK(at_once == (d.type != DeviceType::CPU && compute == Compute::F16 && !apart));
        const std::vector<float> got =
            to(to(m(on_device), DType::F32), Device{}).to_vector<float>();
        CHECK(difference(got, want) < 0.02);
      }
}

}  // namespace omq
