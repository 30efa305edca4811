// The BPE trainer: merges in the right order, and files that the tokenizer reads back.

#include "tools/bpe_trainer.h"

#include <doctest/doctest.h>

#include <string>

#include "models/tokenizer.h"
#include "tensor/error.h"
#include "tools/story_grammar.h"

using namespace omq;

TEST_CASE("the most frequent pair merges first, of equals the one that sorts first") {
  // Words: "aaab" ×3 (two of them with a space in front). Pairs: a a 6, a b 3, Ġ a 2.
  const TokenizerSpec spec = train_bpe("aaab aaab aaab", 257 + 4);
  REQUIRE(spec.merges.size() == 4);
  CHECK(spec.merges[0] == "a a");
  CHECK(spec.merges[1] == "a b");  // 3, as "aa a" is: "a" sorts before "aa"
  CHECK(spec.merges[2] == "aa ab");
  CHECK(spec.merges[3] == "\xC4\xA0 aaab");  // Ġ
  CHECK(spec.tokens.size() == 261);
  CHECK(spec.tokens[0] == "<|endoftext|>");
  CHECK(spec.tokens[1 + 'a'] == "a");
  CHECK(spec.tokens[1 + ' '] == "\xC4\xA0");
  CHECK(spec.tokens[260] ==
        "\xC4\xA0"
        "aaab");
}

TEST_CASE("merges never cross the borders of words") {
  const TokenizerSpec spec = train_bpe(make_stories(1, StorySplit::Train, 20'000), 400);
  for (size_t i = 257; i < spec.tokens.size(); ++i) {
    CAPTURE(spec.tokens[i]);
    CHECK(spec.tokens[i].find("\xC4\xA0", 1) == std::string::npos);  // a space only in front
  }
}

TEST_CASE("a trained tokenizer keeps any text, and survives its files") {
  const Tokenizer trained =
      Tokenizer::from_spec(train_bpe(make_stories(1, StorySplit::Train, 20'000), 400));
  const Tokenizer read =
      Tokenizer::from_json(trained.to_tokenizer_json(), trained.to_tokenizer_config_json());
  for (const std::string& text :
       {std::string("Once there was a shy girl named Lily.\n\nAnna"),
        std::string("gr\xC3\xBC\xC3\x9F dich \xE2\x82\xAC 5, \xF0\x9F\x98\x80\t~"),
        std::string()}) {
    const std::vector<int32_t> ids = trained.encode(text);
    CHECK(trained.decode(ids) == text);
    CHECK(read.encode(text) == ids);
  }
  CHECK(read.encode("Ben<|endoftext|>").back() == 0);
  CHECK(read.bos_id() == 0);
  CHECK(read.eos_ids() == std::vector<int32_t>{0});
  CHECK_FALSE(read.adds_bos());
  CHECK(read.vocab_size() == 400);
}

TEST_CASE("impossible sizes are refused") {
  CHECK_THROWS_WITH_AS(train_bpe("abc", 256),
                       "train_bpe: 256 tokens do not hold the 256 bytes and <|endoftext|>", Error);
  CHECK_THROWS_WITH_AS(
      train_bpe("ab", 400),
      "train_bpe: the text gives 258 tokens, 400 are wanted: use more text or fewer tokens", Error);
}
