// The plan gives what the blocks give, token by token from the same cache; what it cannot run goes
// through the blocks and says so; and a token takes no memory.
#include "models/decode_plan.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "autograd/ops.h"
#include "models/generator.h"
#include "models/packed_model.h"
#include "quant/calibrate.h"
#include "tensor/isa.h"
#include "tensor/parallel.h"
#include "tests/models/allocation_count.h"
#include "tests/models/files.h"
#include "tests/support/random_model.h"
#include "tests/support/restore.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

int32_t some_id(int64_t i, int64_t vocab) {
  return static_cast<int32_t>((i * i * 31 + i * 7 + 3) % vocab);
}

// Largest difference of logits over the largest logit, of every token. Both start each token from
// the same cache, so that one rounding that falls the other way is felt once.
std::vector<double> differences(const Model& model, int64_t tokens) {
  const NoGrad off;
  auto caches = model.new_caches(1, tokens);
  DecodePlan plan(model, tokens);
  std::vector<double> all;
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t id = some_id(t, model.config().vocab_size);
    plan.step(id, caches);
    const std::span<const float> logits = plan.logits();
    const std::vector<float> got(logits.begin(), logits.end());
    for (nn::KVCache& cache : caches) cache.truncate(t);
    const Tensor h = model.forward(Tensor::from<int32_t>({id}, {1, 1}), t, &caches);
    const std::vector<float> want = model.logits(h).to_vector<float>();
    REQUIRE(got.size() == want.size());
    double error = 0, top = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double difference =
          std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i]));
      error = std::isnan(difference) ? INFINITY : std::max(error, difference);
      top = std::max(top, std::abs(static_cast<double>(want[i])));
    }
    all.push_back(error / top);
  }
  std::sort(all.begin(), all.end());
  return all;
}

// Packs a loaded model in place; table: bits of embedding and head, 0: as they are.
void pack(Model& model, int bits, int64_t group, bool symmetric, int table) {
  const quant::QuantSpec spec{.wbits = bits, .group_size = group, .symmetric = symmetric};
  for (auto& block : model.blocks)
    for (auto& [name, linear] : block->linears())
      linear->weight = quant::pack_nearest(linear->dense(), spec);
  if (table == 0) return;
  const bool tied = model.config().tie_word_embeddings;
  auto& embedding = model.ends.embed_tokens.table;
  embedding = quant::pack_nearest(std::get<Tensor>(embedding), {.wbits = table, .group_size = 32});
  model.ends.lm_head.weight =
      tied ? embedding
           : nn::Weight(quant::pack_nearest(model.ends.lm_head.dense(), {.wbits = table}));
}

struct OnDisk {
  TempDir dir;
  std::unique_ptr<CheckpointReader> reader;
  explicit OnDisk(const RandomModel& m) {
    write_random_model(dir / "m", m);
    reader = open_checkpoint(dir / "m");
  }
};

void quantize_activations(Model& model, const ActivationSpec& s) {
  for (auto& block : model.blocks) nn::quantize_activations(*block, s.quant());
}

}  // namespace

TEST_CASE("decode plan: packed at every width, on every instruction set") {
  const Restore restore;
  const OnDisk tied({.type = "llama", .tied = true}), biased({.type = "qwen2", .tied = false});
  for (const char* isa : packed_isas_here()) {
    REQUIRE(force_packed_isa(isa));
    for (const OnDisk* source : {&tied, &biased})
      for (const int bits : {2, 3, 4, 8})
        for (const int64_t group : {0, 32}) {
          CAPTURE(std::string(isa));
          CAPTURE(bits);
          CAPTURE(group);
          Model model = Model::load(*source->reader, 0, LoadAs::F32);
          pack(model, bits, group, bits == 3, bits == 2 ? 0 : 8);
          CHECK(differences(model, 12).back() < 1e-5);
        }
  }
}

TEST_CASE("decode plan: dense weights as they are stored") {
  for (const DType type : {DType::F32, DType::BF16, DType::F16}) {
    CAPTURE(dtype_name(type));
    const OnDisk source({.type = "qwen2", .tied = false, .dtype = type});
    CHECK(differences(Model::load(*source.reader), 40).back() < 1e-5);
  }
}

TEST_CASE("decode plan: the families, rotary scalings and q/k norms of the goldens") {
  for (const char* name : {"llama3-sharded", "mistral", "qwen2", "qwen3"}) {
    CAPTURE(name);
    const auto reader = open_checkpoint(source_path("tests/golden") / name);
    CHECK(differences(Model::load(*reader), 40).back() < 1e-5);
  }
}

TEST_CASE("decode plan: quantised activations, caches of codes") {
  const OnDisk source({.type = "qwen2", .layers = 2, .seed = 5});
  const std::vector<ActivationSpec> specs = {
      {.activation = 4, .q = 4, .k = 4, .v = 4},
      {.activation = 8, .q = 8, .k = 8, .v = 8},
      {.activation = 4, .q = 16, .k = 8, .v = 3},
      {.activation = 16, .q = 16, .k = 4, .v = 16},
      {.activation = 4, .q = 4, .k = 4, .v = 4, .activation_clip = 0.8, .qkv_clip = 0.9},
      {.activation = 4, .q = 4, .k = 4, .v = 4, .p = 16, .include_zero = false}};
  for (const bool packed : {true, false})
    for (const ActivationSpec& s : specs) {
      CAPTURE(packed);
      CAPTURE(s.activation);
      CAPTURE(s.include_zero);
      Model model = Model::load(*source.reader, 0, LoadAs::F32);
      if (packed) pack(model, 4, 32, false, 8);
      quantize_activations(model, s);
      const std::vector<double> d = differences(model, 100);
      CHECK(d.back() < 1e-5);
    }
}

TEST_CASE("decode plan: many keys; the same bits on any number of threads") {
  const Restore restore;
  const auto reader = open_checkpoint(source_path("tests/fixtures/tiny-llama"));
  const Model model = Model::load(*reader);
  CHECK(differences(model, 256).back() < 1e-5);
  std::vector<std::vector<float>> last;
  for (const int threads : {1, 2, 5}) {
    set_num_threads(threads);
    auto caches = model.new_caches(1, 200);
    DecodePlan plan(model, 200);
    for (int64_t t = 0; t < 200; ++t) plan.step(some_id(t, 512), caches);
    const auto logits = plan.logits();
    last.emplace_back(logits.begin(), logits.end());
  }
  CHECK(last[1] == last[0]);
  CHECK(last[2] == last[0]);
}

TEST_CASE("decode plan: a cache of F16 or codes for a model that quantises neither") {
  const auto reader = open_checkpoint(source_path("tests/fixtures/tiny-llama"));
  Model model = Model::load(*reader);
  const auto logits = [&] {
    auto caches = model.new_caches(1, 48);
    DecodePlan plan(model, 48);
    for (int64_t t = 0; t < 48; ++t) plan.step(some_id(t, 512), caches);
    return std::vector<float>(plan.logits().begin(), plan.logits().end());
  };
  const std::vector<float> exact = logits();
  double top = 0;
  for (const float x : exact) top = std::max(top, std::abs(static_cast<double>(x)));
  const std::pair<nn::CacheQuant, double> kinds[] = {
      {{{}, {}, DType::F16}, 1e-3},
      {{RowQuant{.bits = 8}, RowQuant{.bits = 8}}, 1.5e-2},
      {{RowQuant{.bits = 8}, std::nullopt, DType::F16}, 1.5e-2},
      {{RowQuant{.bits = 4}, RowQuant{.bits = 4}}, 0.3}};
  for (const auto& [kept, bound] : kinds) {
    model.kept = kept;
    CHECK(model.new_caches(1, 4).front().quant().k == kept.k);
    CHECK(differences(model, 48).back() < 1e-4);  // plan and blocks
    const std::vector<float> got = logits();
    double error = 0;
    for (size_t i = 0; i < got.size(); ++i)
      error =
          std::max(error, std::abs(static_cast<double>(got[i]) - static_cast<double>(exact[i])));
    CAPTURE(error / top);
    CHECK(error > 0);
    CHECK(error < bound * top);
  }
}

namespace {

// Every sequence of a batch has the logits, bit for bit, that it has alone.
void check_batch(const Model& model, int64_t batch, int64_t tokens) {
  const NoGrad off;
  CAPTURE(batch);
  const int64_t V = model.config().vocab_size;
  const auto id = [V](int64_t n, int64_t t) { return some_id(t + 37 * n, V); };
  DecodePlan together(model, tokens, batch), alone(model, tokens);
  std::vector<std::vector<nn::KVCache>> caches;
  for (int64_t n = 0; n < batch; ++n) caches.push_back(model.new_caches(1, tokens));
  auto of_all = model.new_caches(batch, tokens);
  std::vector<int32_t> ids(static_cast<size_t>(batch));
  int64_t different = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    for (size_t n = 0; n < ids.size(); ++n) ids[n] = id(static_cast<int64_t>(n), t);
    together.step(ids, of_all);
    const auto got = together.logits();
    REQUIRE(got.size() == ids.size() * static_cast<size_t>(V));
    for (size_t n = 0; n < ids.size(); ++n) {
      alone.step(ids[n], caches[n]);
      const auto want = alone.logits();
      different +=
          std::equal(want.begin(), want.end(), got.begin() + static_cast<int64_t>(n * want.size()))
              ? 0
              : 1;
    }
  }
  CHECK(different == 0);
}

}  // namespace

TEST_CASE("decode plan: sequences together are each alone, packed and dense") {
  const Restore restore;
  for (const char* isa : packed_isas_here()) {
    CAPTURE(std::string(isa));
    REQUIRE(force_packed_isa(isa));
    for (const DType type : {DType::F32, DType::F16}) {
      const OnDisk source({.type = "qwen2", .tied = false, .dtype = type});
      for (const int64_t batch : {2, 3, 16}) check_batch(Model::load(*source.reader), batch, 12);
    }
    const OnDisk source({.type = "llama", .tied = true});
    for (const int bits : {3, 4})
      for (const int64_t batch : {2, 3, 16}) {
        CAPTURE(bits);
        Model model = Model::load(*source.reader, 0, LoadAs::F32);
        pack(model, bits, 32, bits == 3, 8);
        check_batch(model, batch, 12);
      }
  }
}

TEST_CASE("decode plan: sequences together are each alone, activations and caches of codes") {
  const Restore restore;
  const OnDisk source({.type = "qwen2", .layers = 2, .seed = 5});
  const std::vector<ActivationSpec> specs = {
      {.activation = 8, .q = 8, .k = 8, .v = 8},
      {.activation = 4, .q = 16, .k = 8, .v = 3},
      {.activation = 16, .q = 16, .k = 4, .v = 16},
      {.activation = 4, .q = 4, .k = 4, .v = 4, .p = 16, .include_zero = false}};
  for (const bool packed : {true, false})
    for (const ActivationSpec& s : specs) {
      CAPTURE(packed);
      CAPTURE(s.activation);
      Model model = Model::load(*source.reader, 0, LoadAs::F32);
      if (packed) pack(model, 4, 32, false, 8);
      quantize_activations(model, s);
      for (const int64_t batch : {2, 16})
        for (const int threads : {1, 3}) {
          set_num_threads(threads);
          check_batch(model, batch, 24);
        }
    }
}

TEST_CASE("decode plan: greedy tokens of several sequences are those of each") {
  const auto reader = open_checkpoint(source_path("tests/fixtures/tiny-llama"));
  const Model model = Model::load(*reader);
  constexpr int64_t kTokens = 40;
  for (const int64_t batch : {2, 3, 16}) {
    CAPTURE(batch);
    DecodePlan together(model, kTokens, batch), alone(model, kTokens);
    std::vector<int32_t> first;
    for (int64_t n = 0; n < batch; ++n) first.push_back(some_id(n, 512));
    auto caches = model.new_caches(batch, kTokens);
    std::vector<std::vector<int32_t>> got(first.size());
    std::span<const int32_t> ids = first;
    for (int64_t t = 0; t < kTokens; ++t) {
      ids = together.choose(ids, caches);
      for (size_t n = 0; n < ids.size(); ++n) got[n].push_back(ids[n]);
    }
    for (size_t n = 0; n < first.size(); ++n) {
      auto own = model.new_caches(1, kTokens);
      std::vector<int32_t> want;
      for (int32_t id = first[n]; static_cast<int64_t>(want.size()) < kTokens;)
        want.push_back(id = alone.choose(id, own));
      CHECK(got[n] == want);
    }
  }
}

TEST_CASE("decode plan: what it cannot run is said, and the generator uses the blocks") {
  const OnDisk source({.tied = true});
  Model model = Model::load(*source.reader, 0, LoadAs::F32);
  CHECK(DecodePlan::supports(model));
  const Tokenizer tokenizer = source.reader->tokenizer();
  CHECK(Generator(model, tokenizer).unplanned().empty());

  Model other = Model::load(*source.reader, 0, LoadAs::F32);
  other.blocks[1]->self_attn.taps.p = RowQuant{.bits = 8};
  CHECK(DecodePlan::unsupported(other) == "attention probabilities are quantised (p_bits)");
  CHECK(message_of([&] { DecodePlan(other, 8); }) ==
        "decode plan: attention probabilities are quantised (p_bits); run the blocks instead");
  Generator fallen(other, tokenizer);
  CHECK(fallen.unplanned() == "attention probabilities are quantised (p_bits)");
  GenerateOptions o;
  o.sampling.temperature = 0;
  o.max_tokens = 8;
  CHECK(fallen.generate(tokenizer.encode("abc"), o).tokens.size() == 8);

  Model pre = Model::load(*source.reader, 0, LoadAs::F32);
  pre.blocks[0]->mlp.down_proj.pre = [](const Tensor& x) { return x; };
  CHECK(DecodePlan::unsupported(pre) == "the input of mlp.down_proj is transformed");
  Model mixed = Model::load(*source.reader, 0, LoadAs::F32);
  mixed.blocks[0]->self_attn.k_proj.input_quant = RowQuant{.bits = 8};
  CHECK(DecodePlan::unsupported(mixed) == "inputs that matrices share are quantised differently");
}

TEST_CASE("decode plan: unhappy paths") {
  const OnDisk source({.tied = true});
  const Model model = Model::load(*source.reader);
  DecodePlan plan(model, 3);
  auto caches = model.new_caches(1, 3);
  CHECK(message_of([&] { plan.step(257, caches); }) ==
        "decode: token 257 is outside the model's vocabulary of 257");
  CHECK(message_of([&] { plan.step(-1, caches); }) ==
        "decode: token -1 is outside the model's vocabulary of 257");
  for (int i = 0; i < 3; ++i) plan.step(5, caches);
  CHECK(message_of([&] { plan.step(5, caches); }) ==
        "context is full: 3 tokens cached, 1 more wanted, room for 3");
  auto two = model.new_caches(2, 3), fresh = model.new_caches(1, 3);
  CHECK(message_of([&] { plan.step(5, two); }) ==
        "decode: caches of 2 sequences, the plan was made for 1");
  CHECK(message_of([&] {
          plan.step(std::vector<int32_t>{5, 5}, fresh);
        }) == "decode: 2 tokens for 1 sequences");
  DecodePlan pair(model, 3, 2);
  CHECK(pair.batch() == 2);
  CHECK(message_of([&] {
          pair.step(std::vector<int32_t>{5, 300}, two);
        }) == "decode: token 300 is outside the model's vocabulary of 257");
  two.back().advance(1);
  CHECK(message_of([&] {
          pair.choose(std::vector<int32_t>{5, 5}, two);
        }) == "decode: caches of 0 and of 1 tokens");
  for (const int64_t batch : {0, 17})
    CHECK(message_of([&] { DecodePlan(model, 3, batch); }) ==
          fmt::format("decode plan: {} sequences at once, 1 to 16 are possible", batch));
  caches.pop_back();
  CHECK(contains(message_of([&] { plan.step(5, caches); }), "1 caches for 2 blocks"));
}

TEST_CASE("decode plan: no memory is taken for a token, nor for its sampling and its text") {
  if (!counts_allocations()) {
    MESSAGE("skipped: this build does not count allocations");
    return;
  }
  const int64_t before_any = allocation_count();
  void* volatile memory = std::malloc(3);  // volatile: or the compiler does without
  std::free(memory);
  REQUIRE(allocation_count() == before_any + 1);  // the counter counts

  const Restore restore;
  for (const int threads : {1, 2}) {
    set_num_threads(threads);
    const OnDisk source({.tied = true});
    for (const bool integers : {false, true}) {
      Model model = Model::load(*source.reader, 0, LoadAs::F32);
      pack(model, 4, 32, false, 8);
      if (integers) quantize_activations(model, {.activation = 8, .q = 8, .k = 8, .v = 4});
      for (const int64_t batch : {1, 3}) {
        auto caches = model.new_caches(batch, 64);
        DecodePlan plan(model, 64, batch);
        std::vector<int32_t> ids(static_cast<size_t>(batch), 1);
        plan.step(ids, caches);  // starts the threads
        plan.logits();
        const int64_t before = allocation_count();
        for (int64_t t = 0; t < 32; ++t) {
          ids.front() = some_id(t, 257);
          plan.step(ids, caches);
          plan.logits();
          plan.choose(ids, caches);
          for (nn::KVCache& cache : caches) cache.truncate(t + 2);
        }
        CHECK(allocation_count() == before);
      }

      const Tokenizer tokenizer = source.reader->tokenizer();
      Generator generator(model, tokenizer);
      for (const double temperature : {0.0, 0.9}) {
        GenerateOptions o;
        o.sampling.temperature = temperature;
        o.sampling.repeat_penalty = 1.1;
        o.max_tokens = 40;
        o.ignore_eos = true;
        o.keep_text = false;
        o.stop = {"never to be seen, being too long for it"};
        // Counts as they stand at each piece of text; the first token is the prompt's.
        std::vector<int64_t> counts;
        counts.reserve(64);
        o.on_text = [&](std::string_view) { counts.push_back(allocation_count()); };
        const GenerateResult r = generator.generate(tokenizer.encode("abc"), o);
        REQUIRE(r.tokens.size() == 40);
        CHECK(r.text.empty());
        REQUIRE(counts.size() >= 20);
        CHECK(counts.back() == counts[1]);
      }
    }
  }
}

TEST_CASE("slow: decode plan: SmolLM2, packed and as stored") {
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: no SmolLM2 (make smollm2)");
    return;
  }
  const auto reader = open_checkpoint(*file);
  Model model = Model::load(*reader, 512);
  CHECK(differences(model, 12).back() < 1e-5);
  for (const int bits : {4, 2}) {
    Model packed = Model::load(*reader, 512);
    pack(packed, bits, 64, false, 8);
    CHECK(differences(packed, 24).back() < 1e-5);
  }
}

}  // namespace omq
