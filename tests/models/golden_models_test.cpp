// The four golden checkpoints (tests/golden/README.md) against Hugging Face transformers: Llama
// with its RoPE scaling in three shards, Mistral, Qwen2 with biases and a tied head, Qwen3 with its
// q/k norm; each by both spellings of config.json. Then what no reference is needed for: the cache,
// the batch and the storage type must not matter.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "models/checkpoint.h"
#include "models/evaluate.h"
#include "models/model.h"
#include "models/safetensors.h"
#include "tests/models/files.h"
#include "tests/support/close.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kModels[] = {"llama3-sharded", "mistral", "qwen2", "qwen3"};
constexpr double kTolerance = 1e-4;  // of logits whose RMS is about 2

fs::path golden_folder(const std::string& name) { return source_path("tests/golden") / name; }

SafetensorsFile expected(const std::string& name) {
  return SafetensorsFile(golden_folder(name) / "expected.safetensors");
}

// The same weights under the config.json that transformers 5 writes.
fs::path with_new_config(const TempDir& dir, const std::string& name) {
  const fs::path folder = dir / name;
  fs::copy(golden_folder(name), folder);
  fs::rename(folder / "config-v5.json", folder / "config.json");
  return folder;
}

Tensor batch_of_one(const Tensor& ids) { return reshape(ids, {1, ids.numel()}); }

Tensor all_logits(const Model& model, const Tensor& ids) {
  NoGrad off;
  return reshape(model.logits(model.forward(batch_of_one(ids))), {ids.numel(), -1});
}

int32_t best(const Tensor& logits) {  // of the last row
  const int64_t v = logits.dim(-1);
  const float* row = logits.data<float>() + (logits.numel() - v);
  return static_cast<int32_t>(std::max_element(row, row + v) - row);
}

// Greedy continuation over the cache: the prompt at once, then token by token.
std::vector<int32_t> greedy(const Model& model, const std::vector<int32_t>& prompt, size_t count) {
  NoGrad off;
  auto caches = model.new_caches(1, 64);
  std::vector<int32_t> next = prompt, out;
  int64_t first = 0;
  while (out.size() < count) {
    const auto n = static_cast<int64_t>(next.size());
    const Tensor hidden = model.forward(Tensor::from<int32_t>(next, {1, n}), first, &caches);
    first += n;
    next = {best(model.logits(hidden))};
    out.push_back(next[0]);
  }
  return out;
}

void check_against_transformers(const fs::path& folder, const SafetensorsFile& want, LoadAs as) {
  const Model model = Model::load(*open_checkpoint(folder), 0, as);
  const Tensor ids = want.get("input_ids");
  CHECK(within(all_logits(model, ids), want.get("logits"), kTolerance));

  const auto losses = token_losses(model, ids.to_vector<int32_t>());
  const auto wanted = want.get("token_loss").to_vector<float>();
  REQUIRE(losses.size() == wanted.size());
  for (size_t i = 0; i < losses.size(); ++i)
    CHECK(std::abs(losses[i] - static_cast<double>(wanted[i])) < kTolerance);

  const auto continuation = want.get("greedy_ids").to_vector<int32_t>();
  std::vector<int32_t> prompt = ids.to_vector<int32_t>();
  prompt.resize(std::stoul(want.metadata().at("greedy_prompt")));
  CHECK(greedy(model, prompt, continuation.size()) == continuation);
}

}  // namespace

TEST_CASE("golden models: logits, losses and greedy text equal transformers'") {
  for (const std::string name : kModels) {
    CAPTURE(name);
    for (const LoadAs as : {LoadAs::Stored, LoadAs::F32})
      check_against_transformers(golden_folder(name), expected(name), as);
  }
}

TEST_CASE("golden models: the config.json of transformers 5 says the same") {
  TempDir dir;
  for (const std::string name : kModels) {
    CAPTURE(name);
    const fs::path folder = with_new_config(dir, name);
    check_against_transformers(folder, expected(name), LoadAs::Stored);
    const Tensor ids = expected(name).get("input_ids");
    const Model old = Model::load(*open_checkpoint(golden_folder(name)));
    const Model fresh = Model::load(*open_checkpoint(folder));
    CHECK(bit_equal(all_logits(fresh, ids), all_logits(old, ids)));
    CHECK(fresh.config().max_position_embeddings == old.config().max_position_embeddings);
    CHECK(fresh.config().eos_token_ids == old.config().eos_token_ids);
  }
}

TEST_CASE("golden models: decoding over the cache equals the whole sequence") {
  NoGrad off;
  for (const std::string name : kModels) {
    CAPTURE(name);
    const Model model = Model::load(*open_checkpoint(golden_folder(name)));
    const Tensor ids = batch_of_one(expected(name).get("input_ids"));
    const Tensor whole = model.logits(model.forward(ids));
    // Pieces of every kind: a prompt, single tokens, a second prompt behind them.
    for (const std::vector<int64_t>& cuts :
         {std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7}, {17, 18, 33}, {39}}) {
      auto caches = model.new_caches(1, ids.numel());
      int64_t begin = 0;
      std::vector<int64_t> ends = cuts;
      ends.push_back(ids.numel());
      for (const int64_t end : ends) {
        CAPTURE(begin);
        CAPTURE(end);
        const Tensor part = contiguous(slice(ids, 1, begin, end));
        const Tensor logits = model.logits(model.forward(part, begin, &caches));
        CHECK(within(logits, slice(whole, 1, begin, end), 2e-5));
        begin = end;
      }
    }
  }
}

TEST_CASE("golden models: sequences of a batch do not see each other") {
  NoGrad off;
  for (const std::string name : kModels) {
    CAPTURE(name);
    const Model model = Model::load(*open_checkpoint(golden_folder(name)));
    const Tensor ids = expected(name).get("input_ids");
    const Tensor two = reshape(ids, {2, 20});
    const Tensor both = model.logits(model.forward(two));
    for (int64_t b = 0; b < 2; ++b) {
      const Tensor one = contiguous(slice(two, 0, b, b + 1));
      CHECK(within(model.logits(model.forward(one)), slice(both, 0, b, b + 1), 2e-5));
    }
  }
}

TEST_CASE("golden models: size, and what does not fit") {
  for (const std::string name : kModels) {
    CAPTURE(name);
    const auto reader = open_checkpoint(golden_folder(name));
    const Model model = Model::load(*reader);
    const ModelSize size = model_size(model);
    const bool half = name != "mistral";
    CHECK(size.bits_per_weight() == doctest::Approx(half ? 16 : 32));
    const int64_t table = 96 * 32;
    CHECK(size.weights ==
          size.block_weights + table * (model.config().tie_word_embeddings ? 1 : 2));
    CHECK_THROWS_WITH_AS(model.forward(Tensor::from<int32_t>({1, 2}, {2})),
                         "model: ids of shape [2], [B,T] wanted", Error);
  }
}

// A GGUF may slow each rotary frequency down by a number of its own (rope_freqs.weight).
TEST_CASE("models: frequency divisors of a GGUF that no rule explains are applied") {
  TempDir dir;
  const auto opened = [&](std::string_view name, GgufBuilder b) {
    return open_checkpoint(write_file(dir / name, b.u32("llama.attention.key_length", 4).build()));
  };
  const auto plain = opened("plain.gguf", tiny_gguf());
  const auto slowed =
      opened("slowed.gguf", tiny_gguf().f32_tensor("rope_freqs.weight", {2}, {3.0f, 1.0f}));
  REQUIRE(slowed->config().rope_divisors.size() == 2);
  const std::vector<float> fast = model_rope(*plain, 10).cos.to_vector<float>();
  const std::vector<float> slow = model_rope(*slowed, 10).cos.to_vector<float>();
  for (size_t p = 0; p < 10; ++p) {
    if (p % 3 == 0) CHECK(slow[2 * p] == doctest::Approx(fast[2 * (p / 3)]));
    CHECK(slow[2 * p + 1] == fast[2 * p + 1]);
  }
}

}  // namespace omq
