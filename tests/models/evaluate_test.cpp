// Perplexity: how each protocol cuts its text, what it counts, and published values of small
// models.
#include "models/evaluate.h"

#include <doctest/doctest.h>

#include <cmath>
#include <numeric>

#include "models/checkpoint.h"
#include "models/json_file.h"
#include "models/safetensors.h"
#include "tensor/error.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

using Ids = std::vector<int32_t>;

const Model& golden_model() {
  static const Model model =
      Model::load(*open_checkpoint(source_path("tests/golden/llama3-sharded")));
  return model;
}

Ids some_ids(size_t n) {
  Ids ids;
  for (size_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>((i * i * 7 + i * 13 + 3) % 96));
  return ids;
}

double mean(const std::vector<double>& v) {
  return std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
}

std::string error_of(const Ids& ids, const PerplexityOptions& o) {
  try {
    evaluate_windows(golden_model(), ids, o);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST_CASE("gptq joins the rows of a file as Hugging Face has them") {
  CHECK(gptq_text("") == "");
  CHECK(gptq_text("one") == "one");
  CHECK(gptq_text(" \n = Title = \n\nText.\n") == "\n\n = Title = \n\n\n\n\nText.\n");
  // Python counts these as white space: no-break space, U+001F, ideographic space, carriage return.
  CHECK(gptq_text("a\n\xC2\xA0\x1F\xE3\x80\x80\r\nb\n") == "a\n\n\n\n\nb\n");
  CHECK(gptq_text("a\n\xE2\x80\x8B\nb") ==
        "a\n\n\n\xE2\x80\x8B\n\n\nb");  // a zero-width space is not one
}

TEST_CASE("documents lie between lines that are the separator") {
  using Texts = std::vector<std::string>;
  CHECK(split_documents(" one\nmore \n<|end|>\n\n<|end|>\ntwo<|end|>\n <|end|> \nthree",
                        "<|end|>") == Texts{"one\nmore", "two<|end|>", "three"});
  CHECK(split_documents("", "<|end|>").empty());
  CHECK(split_documents("<|end|>", "<|end|>").empty());
}

TEST_CASE("losses of single tokens equal transformers'") {
  for (const char* name : {"llama3-sharded", "mistral", "qwen2", "qwen3"}) {
    CAPTURE(name);
    const auto folder = source_path("tests/golden") / name;
    const Model model = Model::load(*open_checkpoint(folder));
    const auto golden = SafetensorsFile(folder / "expected.safetensors");
    const auto wanted = golden.get("token_loss").to_vector<float>();
    const auto losses = token_losses(model, golden.get("input_ids").to_vector<int32_t>());
    REQUIRE(losses.size() == wanted.size());
    for (size_t i = 0; i < losses.size(); ++i) CHECK(std::abs(losses[i] - wanted[i]) < 1e-4);
  }
  CHECK(token_losses(golden_model(), Ids{3}).empty());
}

TEST_CASE("gptq: every prediction of every whole window") {
  const Ids ids = some_ids(50);
  const auto r = evaluate_windows(golden_model(), ids, {.context = 16});
  std::vector<double> means;
  for (int w = 0; w < 3; ++w)
    means.push_back(
        mean(token_losses(golden_model(), Ids(ids.begin() + w * 16, ids.begin() + (w + 1) * 16))));
  CHECK(r.mean_nll == doctest::Approx(mean(means)).epsilon(1e-5));
  CHECK(r.perplexity == std::exp(r.mean_nll));
  CHECK(r.tokens == 50);
  CHECK(r.windows == 3);
  CHECK(r.available == 3);
  CHECK(r.predicted == 45);
  const auto two = evaluate_windows(golden_model(), ids, {.context = 16, .max_windows = 2});
  CHECK(two.windows == 2);
  CHECK(two.available == 3);
  CHECK(two.mean_nll == doctest::Approx((means[0] + means[1]) / 2).epsilon(1e-5));
}

TEST_CASE("llama.cpp: the second half of each window, BOS in the place of its first token") {
  const Ids ids = some_ids(50);
  const PerplexityOptions options{.context = 16, .protocol = Protocol::LlamaCpp};
  for (const int32_t bos : {-1, 5}) {
    CAPTURE(bos);
    const auto r = evaluate_windows(golden_model(), ids, options, bos);
    std::vector<double> wanted;
    for (int w = 0; w < 3; ++w) {
      Ids window(ids.begin() + w * 16, ids.begin() + (w + 1) * 16);
      if (bos >= 0) window[0] = bos;
      const auto losses = token_losses(golden_model(), window);
      wanted.insert(wanted.end(), losses.begin() + 8,
                    losses.end());  // 8 sees nine tokens and predicts the tenth
    }
    CHECK(r.predicted == 3 * 7);
    CHECK(r.mean_nll == doctest::Approx(mean(wanted)).epsilon(1e-5));
  }
}

TEST_CASE("what cannot be measured is said") {
  CHECK(error_of(some_ids(15), {.context = 16}) ==
        "perplexity: the text has 15 tokens, less than one window of 16");
  CHECK(error_of(some_ids(600), {.context = 600}) ==
        "perplexity: windows of 600 tokens, but the model is good for 512");
  CHECK(error_of(some_ids(5), {.context = 1}) ==
        "perplexity: windows of 1 tokens; at least 2 are needed");
  CHECK_THROWS_WITH_AS(
      protocol_from("wikitext"),
      "perplexity protocol \"wikitext\" is not known; there are gptq, llama.cpp and documents",
      Error);
  CHECK(protocol_from("llama.cpp") == Protocol::LlamaCpp);
}

TEST_CASE("the bundled model on its own test text") {
  const auto folder = source_path("tests/fixtures/tiny-llama");
  const auto reader = open_checkpoint(folder);
  const Model model = Model::load(*reader);
  const auto text = read_text_file(folder / "test.txt");
  int64_t calls = 0, last = 0;
  const auto r =
      evaluate_perplexity(model, reader->tokenizer(), text, {.context = 128, .max_windows = 20},
                          [&](int64_t done, int64_t total, double perplexity) {
                            ++calls;
                            CHECK(done > last);
                            CHECK(total == 20);
                            CHECK(perplexity > 1);
                            last = done;
                          });
  CHECK(last == 20);
  CHECK(r.perplexity > 1.0);
  CHECK(r.perplexity < 4.0);  // a text of the kind that it was trained on
}

// stories260K: a published model; its source document defines the protocol and the values.
std::optional<PerplexityResult> stories(int64_t count) {
  const auto file = shared_path("data/model-stories260k/stories260K.gguf");
  const auto text = shared_path("data/tinystories/tinystories_valid_head.txt");
  if (!file || !text) {
    MESSAGE("skipped: no shared/data/model-stories260k or tinystories");
    return {};
  }
  const auto reader = open_checkpoint(*file);
  const Model model = Model::load(*reader, 512);
  return evaluate_perplexity(
      model, reader->tokenizer(), read_text_file(*text),
      {.context = 512, .protocol = Protocol::Documents, .max_windows = count, .skip = 1});
}

TEST_CASE("stories260K: the first stories of the published protocol") {
  const auto r = stories(20);
  if (!r) return;
  CHECK(r->windows == 20);
  CHECK(r->bos);
  CHECK(r->mean_nll == doctest::Approx(1.187).epsilon(0.02));
}

TEST_CASE("slow: stories260K: loss over stories 2 to 301") {
  const auto r = stories(300);
  if (!r) return;
  CHECK(r->predicted == 107698);
  CHECK(std::abs(r->mean_nll - 1.2642) < 0.001);
}

}  // namespace
}  // namespace omq
