// Generation on the bundled model: the cache changes nothing, text leaves whole, and every way to
// end.
#include "models/generator.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "models/checkpoint.h"
#include "models/safetensors.h"
#include "tensor/error.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

using Ids = std::vector<int32_t>;

struct Loaded {
  std::unique_ptr<CheckpointReader> reader;
  Tokenizer tokenizer;
  Model model;
};
Loaded& tiny() {
  static Loaded loaded = [] {
    auto reader = open_checkpoint(source_path("tests/fixtures/tiny-llama"));
    Tokenizer tokenizer = reader->tokenizer();
    Model model = Model::load(*reader);
    return Loaded{std::move(reader), std::move(tokenizer), std::move(model)};
  }();
  return loaded;
}

GenerateOptions greedy(int64_t n) {
  GenerateOptions o;
  o.sampling.temperature = 0;
  o.max_tokens = n;
  return o;
}

Ids prompt() { return tiny().tokenizer.encode("Ella was a cheerful girl."); }

std::string error_of(Generator& g, const Ids& ids, const GenerateOptions& o) {
  try {
    g.generate(ids, o);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST_CASE("stop strings: held back while they may still come") {
  StopFilter f({"END", "E\n"});
  CHECK(f.push("The E") == "The ");
  CHECK(f.push("N") == "");
  CHECK(f.push("glish") == "ENglish");
  CHECK(f.push(" E") == " ");
  CHECK(f.push("E") == "E");
  CHECK(f.push("ND and more") == "");
  CHECK(f.met());
  CHECK(f.found() == "END");
  CHECK(f.push("nothing") == "");
  CHECK(f.flush() == "");

  StopFilter earliest({"b", "ab"});
  CHECK(earliest.push("xab") == "x");
  CHECK(earliest.found() == "ab");

  StopFilter never({"END"});
  CHECK(never.push("the EN") == "the ");
  CHECK(never.flush() == "EN");
  CHECK_FALSE(never.met());
  CHECK(StopFilter({""}).push("text") == "text");
}

TEST_CASE("the greedy continuation of transformers, with cache and without") {
  for (const char* name : {"llama3-sharded", "mistral", "qwen2", "qwen3"}) {
    CAPTURE(name);
    const auto folder = source_path("tests/golden") / name;
    const auto reader = open_checkpoint(folder);
    const Model model = Model::load(*reader);
    const auto golden = SafetensorsFile(folder / "expected.safetensors");
    const auto input = golden.get("input_ids").to_vector<int32_t>();
    const auto wanted = golden.get("greedy_ids").to_vector<int32_t>();
    Generator generator(model, tiny().tokenizer);
    Ids ids(input.begin(), input.begin() + 8), made;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const std::vector<float> logits = generator.next_logits(ids);
      ids.push_back(
          static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      made.push_back(ids.back());
    }
    CHECK(made == wanted);
    generator.reset();
    ids.pop_back();
    const std::vector<float> whole = generator.next_logits(ids);
    CHECK(std::max_element(whole.begin(), whole.end()) - whole.begin() == wanted.back());
  }
}

TEST_CASE("batch size and reused prefix do not change the text") {
  Generator g(tiny().model, tiny().tokenizer);
  GenerateOptions o = greedy(40);
  const GenerateResult first = g.generate(prompt(), o);
  CHECK(first.tokens.size() == 40);
  CHECK(first.finish == FinishReason::MaxTokens);
  CHECK(first.stats.prompt_tokens == static_cast<int64_t>(prompt().size()));
  CHECK(first.stats.reused_tokens == 0);
  CHECK(first.stats.generated_tokens == 40);
  CHECK(first.stats.decode_steps == 39);
  o.threads = 1;
  o.batch_threads = 2;
  for (const int64_t batch : {1, 3, 512}) {
    Generator fresh(tiny().model, tiny().tokenizer);
    o.batch = batch;
    CHECK(fresh.generate(prompt(), o).tokens == first.tokens);
  }
  // The same again: all of the prompt but its last token is there.
  const GenerateResult again = g.generate(prompt(), o);
  CHECK(again.tokens == first.tokens);
  CHECK(again.stats.reused_tokens == static_cast<int64_t>(prompt().size()) - 1);
  // The conversation goes on behind the answer.
  Ids longer = prompt();
  longer.insert(longer.end(), first.tokens.begin(), first.tokens.begin() + 20);
  const GenerateResult rest = g.generate(longer, greedy(20));
  CHECK(rest.stats.reused_tokens == static_cast<int64_t>(longer.size()) - 1);
  CHECK(std::equal(rest.tokens.begin(), rest.tokens.end(), first.tokens.begin() + 20));
}

TEST_CASE("streamed pieces are the text, and stop strings end it") {
  Generator g(tiny().model, tiny().tokenizer);
  GenerateOptions o = greedy(40);
  std::string streamed;
  o.on_text = [&](std::string_view piece) {
    CHECK_FALSE(piece.empty());
    streamed += piece;
  };
  const GenerateResult whole = g.generate(prompt(), o);
  CHECK(streamed == whole.text);
  CHECK(whole.text == tiny().tokenizer.decode(whole.tokens, {.start_of_text = false}));

  REQUIRE(whole.text.size() > 30);
  const std::string word = whole.text.substr(20, 5);
  const size_t at = whole.text.find(word);
  o.stop = {word, "never to be seen"};
  streamed.clear();
  const GenerateResult cut = g.generate(prompt(), o);
  CHECK(cut.finish == FinishReason::StopString);
  CHECK(cut.stop == word);
  CHECK(cut.text == whole.text.substr(0, at));
  CHECK(streamed == cut.text);
}

TEST_CASE("the model ends the text, unless told to ignore that") {
  Generator g(tiny().model, tiny().tokenizer);
  const int32_t eos = tiny().tokenizer.eos_ids().at(0);
  CHECK(g.ends_text(eos));
  GenerateOptions o = greedy(5);
  o.sampling.logit_bias = {{eos, 100.0}};
  const GenerateResult r = g.generate(prompt(), o);
  CHECK(r.finish == FinishReason::EndOfText);
  CHECK(r.tokens == Ids{eos});
  CHECK(r.text.empty());
  o.ignore_eos = true;
  const GenerateResult on = g.generate(prompt(), o);
  CHECK(on.finish == FinishReason::MaxTokens);
  CHECK(on.tokens == g.generate(prompt(), greedy(5)).tokens);
}

TEST_CASE("a full context ends the text and is said; a prompt that does not fit is refused") {
  Generator g(tiny().model, tiny().tokenizer, 16);
  GenerateOptions o = greedy(-1);
  o.ignore_eos = true;
  const Ids ids = prompt();
  REQUIRE(ids.size() < 16);
  const GenerateResult r = g.generate(ids, o);
  CHECK(r.finish == FinishReason::ContextFull);
  CHECK(ids.size() + r.tokens.size() == 17);  // the last one needs no place in the cache
  const Ids too_long(17, 5);
  CHECK(error_of(g, too_long, o) ==
        "generate: the prompt has 17 tokens, the context holds 16; raise -c or shorten the prompt");
  CHECK(error_of(g, {}, o) == "generate: the prompt is empty");
  CHECK(error_of(g, {512}, o) == "generate: token 512 is outside the model's vocabulary of 512");
  o.sampling.top_k = -1;
  CHECK(error_of(g, ids, o) == "--top-k -1 is negative; 0 keeps all tokens");
  // None of this harmed the cache.
  CHECK(g.generate(ids, greedy(5)).tokens ==
        Generator(tiny().model, tiny().tokenizer).generate(ids, greedy(5)).tokens);
  CHECK_THROWS_AS(Generator(tiny().model, tiny().tokenizer, 257), Error);
}

TEST_CASE("continuations made together are those of their seeds") {
  Generator g(tiny().model, tiny().tokenizer), single(tiny().model, tiny().tokenizer);
  GenerateOptions o = greedy(40);
  for (const double temperature : {0.0, 1.2}) {
    o.sampling.temperature = temperature;
    for (const int64_t count : {1, 3, 16}) {
      CAPTURE(temperature);
      CAPTURE(count);
      o.sampling.seed = 11;
      bool streamed = false;
      o.on_text = [&](std::string_view) { streamed = true; };
      const auto all = g.generate_parallel(prompt(), count, o);
      CHECK_FALSE(streamed);
      o.on_text = nullptr;
      REQUIRE(static_cast<int64_t>(all.size()) == count);
      for (const GenerateResult& r : all) {
        const GenerateResult one = single.generate(prompt(), o);
        ++o.sampling.seed;
        CHECK(r.tokens == one.tokens);
        CHECK(r.text == one.text);
        CHECK(r.finish == one.finish);
        CHECK(r.stats.generated_tokens == one.stats.generated_tokens);
        CHECK(r.stats.decode_steps == one.stats.decode_steps);
      }
      // The prompt stays in the generator's cache.
      CHECK(g.generate_parallel(prompt(), 2, greedy(1)).front().stats.reused_tokens ==
            static_cast<int64_t>(prompt().size()) - 1);
    }
  }
}

TEST_CASE("continuations made together end one by one") {
  Generator g(tiny().model, tiny().tokenizer), single(tiny().model, tiny().tokenizer);
  GenerateOptions o = greedy(60);
  o.sampling.temperature = 1.5;
  o.stop = {"."};
  std::vector<size_t> lengths;
  uint64_t seed = o.sampling.seed = 3;
  for (const GenerateResult& r : g.generate_parallel(prompt(), 6, o)) {
    o.sampling.seed = seed++;
    const GenerateResult one = single.generate(prompt(), o);
    CHECK(r.tokens == one.tokens);
    CHECK(r.text == one.text);
    CHECK(r.finish == one.finish);
    CHECK(r.stop == one.stop);
    lengths.push_back(r.tokens.size());
  }
  std::sort(lengths.begin(), lengths.end());
  CHECK(lengths.front() < lengths.back());

  for (const GenerateResult& r : g.generate_parallel(prompt(), 2, greedy(0))) {
    CHECK(r.tokens.empty());
    CHECK(r.finish == FinishReason::MaxTokens);
  }
  Generator narrow(tiny().model, tiny().tokenizer, 16);
  o = greedy(-1);
  o.ignore_eos = true;
  for (const GenerateResult& r : narrow.generate_parallel(prompt(), 3, o)) {
    CHECK(r.finish == FinishReason::ContextFull);
    CHECK(r.tokens == narrow.generate(prompt(), o).tokens);
  }
  std::atomic<bool> stop{true};
  o.cancel = &stop;
  for (const GenerateResult& r : narrow.generate_parallel(Ids{5, 6}, 2, o))
    CHECK(r.finish == FinishReason::Cancelled);
  for (const int64_t count : {0, 17})
    CHECK_THROWS_WITH_AS(
        g.generate_parallel(prompt(), count, greedy(3)),
        fmt::format("generate: {} continuations at once, 1 to 16 are possible", count).c_str(),
        Error);
}

TEST_CASE("continuations made together that fail leave the generator usable") {
  Model model = Model::load(*tiny().reader);
  Generator g(model, tiny().tokenizer, 32);
  const Tensor norm = model.ends.norm.weight;
  CHECK_THROWS_AS(g.generate_parallel(Ids{}, 2, greedy(3)), Error);
  CHECK_THROWS_AS(g.generate_parallel(Ids(40, 5), 2, greedy(3)), Error);
  const auto wanted = g.generate(prompt(), greedy(8)).tokens;
  const float kept = norm.data<float>()[0];
  for (const double temperature : {0.0, 1.0}) {  // chosen by the plan, and sampled
    GenerateOptions o = greedy(8);
    o.sampling.temperature = temperature;
    norm.data<float>()[0] = std::nanf("");
    CHECK_THROWS_AS(g.generate_parallel(prompt(), 3, o), Error);
    norm.data<float>()[0] = kept;
    CHECK(g.generate(prompt(), greedy(8)).tokens == wanted);
    CHECK(g.generate_parallel(prompt(), 2, greedy(8)).back().tokens == wanted);
  }
}

TEST_CASE("continuations made together by the blocks, where no plan runs the model") {
  Model model = Model::load(*tiny().reader);
  for (auto& block : model.blocks) block->self_attn.taps.p = RowQuant{.bits = 8};
  Generator g(model, tiny().tokenizer);
  REQUIRE_FALSE(g.unplanned().empty());
  const auto all = g.generate_parallel(prompt(), 3, greedy(12));
  const GenerateResult one = g.generate(prompt(), greedy(12));
  for (const GenerateResult& r : all) CHECK(r.tokens == one.tokens);
}

TEST_CASE("cancelling ends at the next token and leaves the generator usable") {
  Generator g(tiny().model, tiny().tokenizer);
  std::atomic<bool> stop{false};
  GenerateOptions o = greedy(50);
  o.cancel = &stop;
  int pieces = 0;
  o.on_text = [&](std::string_view) { stop = ++pieces == 3; };
  const GenerateResult r = g.generate(prompt(), o);
  CHECK(r.finish == FinishReason::Cancelled);
  CHECK(r.tokens.size() < 10);
  stop = true;
  g.reset();
  CHECK(g.generate(prompt(), o).tokens.empty());
  stop = false;
  o.on_text = nullptr;
  CHECK(g.generate(prompt(), o).tokens ==
        Generator(tiny().model, tiny().tokenizer).generate(prompt(), greedy(50)).tokens);
}

TEST_CASE("stories260K: greedy text begins as published") {
  const auto file = shared_path("data/model-stories260k/stories260K.gguf");
  if (!file) {
    MESSAGE("skipped: no shared/data/model-stories260k");
    return;
  }
  const auto reader = open_checkpoint(*file);
  const Model model = Model::load(*reader, 512);
  const Tokenizer tokenizer = reader->tokenizer();
  const std::string sample =
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
      "park. One day, she saw a "
      "big, red ball.";
  // From BOS alone, and behind the first words.
  CHECK(Generator(model, tokenizer)
            .generate(tokenizer.encode(""), greedy(100))
            .text.starts_with(sample));
  const std::string opening = sample.substr(0, 16);
  CHECK((opening + Generator(model, tokenizer).generate(tokenizer.encode(opening), greedy(95)).text)
            .starts_with(sample));
}

TEST_CASE("one seed gives one text") {
  Generator g(tiny().model, tiny().tokenizer);
  GenerateOptions o;
  o.max_tokens = 30;
  o.sampling.temperature = 1.5;
  o.sampling.seed = 11;
  const Ids first = g.generate(prompt(), o).tokens;
  CHECK(g.generate(prompt(), o).tokens == first);
  o.sampling.seed = 12;
  CHECK(g.generate(prompt(), o).tokens != first);
}

}  // namespace
}  // namespace omq
