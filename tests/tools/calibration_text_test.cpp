// Calibration windows: CPython's random numbers, the official project's sampling, and files of
// token ids, right and wrong.
#include "tools/calibration_text.h"

#include <doctest/doctest.h>

#include <span>

#include "models/hash.h"
#include "tests/models/files.h"
#include "tests/support/random_model.h"

namespace omq {
namespace {

using Ids = std::vector<int32_t>;

// One token a byte: its id is the byte.
Tokenizer byte_tokenizer() { return Tokenizer::from_json(detail::byte_tokenizer().dump()); }

std::string some_text(size_t n) {
  std::string s(n, ' ');
  for (size_t i = 0; i < n; ++i) s[i] = static_cast<char>('a' + (i * i / 7 + i) % 26);
  return s;
}

Ids bytes_as_ids(std::string_view text) {
  Ids ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

std::vector<int64_t> draws(uint32_t seed, int64_t size, int count) {
  PythonRandom random(seed);
  std::vector<int64_t> out;
  for (int i = 0; i < count; ++i) out.push_back(random.randint(0, size - 1));
  return out;
}

TEST_CASE("python random: the sequences of CPython") {
  CHECK(draws(2, 2822443, 8) ==
        std::vector<int64_t>{237193, 384134, 355978, 1514384, 709188, 2809052, 1292417, 1055216});
  CHECK(draws(0, 356317, 8) ==
        std::vector<int64_t>{201979, 220500, 21225, 135746, 268055, 254766, 212302, 159023});
  // random.seed(S); [random.randint(0, size - 1) for …], the largest 32-bit seed among them.
  CHECK(draws(1, 2, 8) == std::vector<int64_t>{0, 0, 1, 0, 1, 1, 1, 1});
  CHECK(draws(4294967295u, 100, 5) == std::vector<int64_t>{81, 79, 26, 27, 77});
  PythonRandom moved(2), plain(2);
  for (int i = 0; i < 700; ++i) CHECK(moved.randint(-50, 949) == plain.randint(0, 999) - 50);
  PythonRandom one(7);
  for (int i = 0; i < 40; ++i) CHECK(one.randint(3, 3) == 3);
  CHECK_THROWS_AS(one.randint(1, 0), Error);
  CHECK_THROWS_AS(one.randint(0, int64_t{1} << 32), Error);
}

TEST_CASE("windows from text: where the official project's sampling puts them") {
  TempDir dir;
  const std::string text = some_text(300);
  write_file(dir / "a.txt", text);
  const auto w = windows_from_text({dir / "a.txt"}, byte_tokenizer(), 6, 10, 2);
  REQUIRE(w.ids.shape() == Shape{6, 10});
  CHECK(w.ids.dtype() == DType::I32);
  const std::vector<int64_t> starts = draws(2, 300 - 10, 6);  // randint(0, tokens − length − 1)
  Ids want;
  for (const int64_t start : starts)
    for (const int32_t id :
         bytes_as_ids(std::string_view(text).substr(static_cast<size_t>(start), 10)))
      want.push_back(id);
  CHECK(w.ids.to_vector<int32_t>() == want);
  CHECK(w.hash == sha256(std::as_bytes(std::span(want))));
  CHECK(w.description == fmt::format("6 windows of 10 tokens out of 300 tokens of {}, seed 2",
                                     (dir / "a.txt").string()));
  // More windows begin with the same ones; another seed takes others.
  const auto more = windows_from_text({dir / "a.txt"}, byte_tokenizer(), 9, 10, 2);
  Ids first = more.ids.to_vector<int32_t>();
  first.resize(60);
  CHECK(first == want);
  CHECK(windows_from_text({dir / "a.txt"}, byte_tokenizer(), 6, 10, 3).hash != w.hash);
}

TEST_CASE("windows from text: files are joined by an empty line") {
  TempDir dir;
  write_file(dir / "a", "abc");
  write_file(dir / "b", "de\n");
  const auto w = windows_from_text({dir / "a", dir / "b"}, byte_tokenizer(), 1, 7, 2);
  CHECK(w.ids.to_vector<int32_t>() == bytes_as_ids("abc\n\nde"));
  CHECK(contains(w.description, "out of 8 tokens of"));
}

TEST_CASE("windows from text: one token more than a window is enough, one less is not") {
  TempDir dir;
  write_file(dir / "t", "abcdef");
  CHECK(windows_from_text({dir / "t"}, byte_tokenizer(), 3, 5, 2).ids.to_vector<int32_t>() ==
        bytes_as_ids("abcdeabcdeabcde"));
  const std::string message =
      message_of([&] { windows_from_text({dir / "t"}, byte_tokenizer(), 3, 6, 2); });
  CHECK(contains(message, (dir / "t").string()));
  CHECK(contains(message, "6 tokens, one calibration window needs 7"));
  CHECK(contains(message, "--seqlen"));
}

TEST_CASE("windows from text: what cannot be read is named") {
  TempDir dir;
  write_file(dir / "empty", "");
  const auto message = [&](const std::filesystem::path& file) {
    return message_of([&] { windows_from_text({file}, byte_tokenizer(), 1, 4, 2); });
  };
  CHECK(contains(message(dir / "nowhere"), "nowhere: no such file"));
  CHECK(contains(message(dir.path()), dir.path().string()));
  CHECK(contains(message(dir / "empty"), "0 tokens"));
  write_file(dir / "t", some_text(100));
  CHECK(contains(
      message_of([&] { windows_from_text({dir / "t"}, byte_tokenizer(), int64_t{1} << 50, 4, 2); }),
      "windows of 4 tokens"));
}

TEST_CASE("windows from ids: as they are") {
  TempDir dir;
  write_file(dir / "ids.jsonl", "[1, 2, 3]\n\n[4,5,6]\r\n[7,8,9]");
  const auto w = windows_from_ids(dir / "ids.jsonl", 10, 0);
  CHECK(w.ids.shape() == Shape{3, 3});
  CHECK(w.ids.to_vector<int32_t>() == Ids{1, 2, 3, 4, 5, 6, 7, 8, 9});
  CHECK(contains(w.description, "3 windows of 3 tokens, ids of"));
  const Ids ids = w.ids.to_vector<int32_t>();
  CHECK(w.hash == sha256(std::as_bytes(std::span(ids))));
  const auto two = windows_from_ids(dir / "ids.jsonl", 10, 2);
  CHECK(two.ids.to_vector<int32_t>() == Ids{1, 2, 3, 4, 5, 6});
  CHECK(windows_from_ids(dir / "ids.jsonl", 10, 99).ids.dim(0) == 3);
}

TEST_CASE("windows from ids: the line that is wrong is named") {
  TempDir dir;
  struct Case {
    const char *text, *message;
  };
  const Case cases[] = {
      {"", "no windows of token ids"},
      {"\n\n", "no windows of token ids"},
      {"[1,2]\n[1,2", ":2: not a JSON array of token ids"},
      {"{\"ids\": [1, 2]}", ":1: not a JSON array of token ids"},
      {"hello", ":1: not a JSON array of token ids"},
      {"[1,2] [3,4]", ":1: not a JSON array of token ids"},
      {"[1,2]\n\n[1,2,3]", ":3: 3 ids, the first window has 2"},
      {"[1]", ":1: 1 ids"},
      {"[]", ":1: 0 ids"},
      {"[1,10]", ":1: 10 is not a token id below 10"},
      {"[1,2]\n[-1,2]", ":2: -1 is not a token id below 10"},
      {"[1,2.5]", ":1: 2.5 is not a token id"},
      {"[1,\"2\"]", ":1: \"2\" is not a token id"},
      {"[1,null]", ":1: null is not a token id"},
      {"[1,4294967297]", ":1: 4294967297 is not a token id"},
      {"[1,18446744073709551615]", "is not a token id"},
  };
  for (const Case& c : cases) {
    CAPTURE(std::string(c.text));
    write_file(dir / "ids.jsonl", c.text);
    const std::string message = message_of([&] { windows_from_ids(dir / "ids.jsonl", 10, 0); });
    CAPTURE(message);
    CHECK(contains(message, "ids.jsonl"));
    CHECK(contains(message, c.message));
  }
  CHECK(contains(message_of([&] { windows_from_ids(dir / "nowhere", 10, 0); }),
                 "nowhere: no such file"));
  CHECK(contains(message_of([&] { windows_from_ids(dir.path(), 10, 0); }), "not a regular file"));
}

}  // namespace
}  // namespace omq
