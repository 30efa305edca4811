// SmolLM2-135M-Instruct against transformers: token losses, logits, greedy text, perplexities
// (reference values of shared/smollm2/README.md). Everything here is slow, and skipped without the
// model (`make smollm2`).
//
// OMQ_SMOLLM2_HF names a folder made by shared/smollm2/to_hf.py, the same weights by another way.
#include <doctest/doctest.h>

#include <cmath>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "models/checkpoint.h"
#include "models/evaluate.h"
#include "models/generator.h"
#include "models/json_file.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

struct Loaded {
  std::unique_ptr<CheckpointReader> reader;
  Tokenizer tokenizer;
  Model model;
};

std::shared_ptr<Loaded> load(const std::filesystem::path& path) {
  auto reader = open_checkpoint(path);
  Tokenizer tokenizer = reader->tokenizer();
  Model model = Model::load(*reader, 2048);
  return std::make_shared<Loaded>(
      Loaded{std::move(reader), std::move(tokenizer), std::move(model)});
}

// Null, and a message, without the model.
std::shared_ptr<Loaded> smollm2() {
  static std::shared_ptr<Loaded> loaded;
  const auto file = smollm2_gguf();
  if (!file)
    MESSAGE("skipped: no SmolLM2; make smollm2 fetches it");
  else if (!loaded)
    loaded = load(*file);
  return loaded;
}

std::optional<json> reference() {
  const auto file = shared_path("smollm2/reference.json");
  if (!file) {
    MESSAGE("skipped: no shared/smollm2/reference.json");
    return {};
  }
  return parse_json(read_text_file(*file), "reference.json");
}

void check_losses_and_logits(const Loaded& m, const json& cases) {
  Generator generator(m.model, m.tokenizer);
  for (const auto& [name, want] : cases.items()) {
    CAPTURE(name);
    const Ids ids = want["ids"].get<Ids>();
    CHECK(m.tokenizer.encode(want["text"].get<std::string>()) == ids);
    const auto losses = token_losses(m.model, ids);
    const auto wanted = want["nll"].get<std::vector<double>>();
    REQUIRE(losses.size() == wanted.size());
    for (size_t i = 0; i < losses.size(); ++i) CHECK(std::abs(losses[i] - wanted[i]) < 1e-3);
    const auto logits = generator.next_logits(ids);
    for (size_t i = 0; i < 5; ++i) {
      const auto id = want["last_top5_ids"][i].get<size_t>();
      CHECK(std::abs(logits[id] - want["last_top5_logits"][i].get<double>()) < 2e-3);
    }
  }
}

TEST_CASE("slow: SmolLM2: tokens, losses and logits equal transformers'") {
  const auto m = smollm2();
  const auto cases = reference();
  if (m && cases) check_losses_and_logits(*m, *cases);
}

TEST_CASE("slow: SmolLM2: the Hugging Face folder gives the same") {
  const char* folder = std::getenv("OMQ_SMOLLM2_HF");
  const auto cases = reference();
  if (!folder || !std::filesystem::exists(folder)) {
    MESSAGE("skipped: OMQ_SMOLLM2_HF names no folder of to_hf.py");
    return;
  }
  if (cases) check_losses_and_logits(*load(folder), *cases);
}

TEST_CASE("slow: SmolLM2: greedy text equals transformers'") {
  const auto m = smollm2();
  const auto cases = reference();
  if (!m || !cases) return;
  Generator generator(m->model, m->tokenizer);
  for (const auto& [name, want] : cases->items()) {
    CAPTURE(name);
    const Ids wanted = want["greedy_ids"].get<Ids>();
    GenerateOptions o;
    o.sampling.temperature = 0;
    o.max_tokens = static_cast<int64_t>(wanted.size());
    CHECK(generator.generate(want["ids"].get<Ids>(), o).tokens == wanted);
  }
}

// Perplexity of the first windows of WikiText-2, by the number of windows done.
std::map<int64_t, double> wikitext(const Loaded& m, const PerplexityOptions& options) {
  const auto file = shared_path("data/wikitext2/wiki.test.raw");
  std::map<int64_t, double> after;
  if (!file) {
    MESSAGE("skipped: no shared/data/wikitext2");
    return after;
  }
  const auto r = evaluate_perplexity(
      m.model, m.tokenizer, read_text_file(*file), options,
      [&](int64_t done, int64_t, double perplexity) { after[done] = perplexity; });
  CHECK(r.tokens == (options.protocol == Protocol::Gptq ? 304978 : 303415));
  after[r.windows] = r.perplexity;
  return after;
}

void check_close(double value, double wanted) { CHECK(std::abs(value / wanted - 1) < 0.001); }

TEST_CASE("slow: SmolLM2: perplexities by the GPTQ protocol") {
  const auto m = smollm2();
  if (!m) return;
  auto short_windows = wikitext(*m, {.context = 512, .max_windows = 40});
  if (short_windows.empty()) return;
  check_close(short_windows.at(20), 35.8803);
  check_close(short_windows.at(40), 29.1881);
  check_close(wikitext(*m, {.context = 2048, .max_windows = 20}).at(20), 20.9671);
}

TEST_CASE("slow: SmolLM2: perplexity by llama.cpp's protocol") {
  const auto m = smollm2();
  if (!m) return;
  const auto after =
      wikitext(*m, {.context = 512, .protocol = Protocol::LlamaCpp, .max_windows = 40});
  if (!after.empty()) check_close(after.at(40), 23.5113);
}

}  // namespace
}  // namespace omq
