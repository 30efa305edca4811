// The manners that all programs share: option spelling, suggestions, numbers for people.
#include "tools/cli.h"

#include <doctest/doctest.h>
#include <CLI/CLI.hpp>
#include <limits>

#include "tools/memory_option.h"

namespace omq::cli {
namespace {

struct Parsed {
  std::string error, name;
  int number = 0;
  bool flag = false;
};

Parsed parsed(const Args& args) {
  Parsed p;
  CLI::App app("a test", "program");
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("-n,--group-size", p.number);
  app.add_option("--name_of", p.name);
  app.add_flag("--no-perf", p.flag);
  try {
    parse(app, args, {{"-gs", "--group-size"}});
  } catch (const UsageError& e) {
    p.error = e.what();
  }
  return p;
}

TEST_CASE("'-' and '_' are one letter in option names, and only there") {
  CHECK(parsed({"--group-size", "3"}).number == 3);
  CHECK(parsed({"--group_size=4"}).number == 4);
  CHECK(parsed({"-gs", "5"}).number == 5);
  CHECK(parsed({"-n", "-1"}).number == -1);
  CHECK(parsed({"-n", "1", "-n", "2"}).number == 2);
  CHECK(parsed({"--name-of", "a_b-c"}).name == "a_b-c");
  CHECK(parsed({"--name_of=a_b=c"}).name == "a_b=c");
  CHECK(parsed({"--no_perf"}).flag);
}

TEST_CASE("errors name the option") {
  CHECK(parsed({"--group-sise", "3"}).error ==
        "unknown option --group-sise, did you mean --group-size?; program --help lists all");
  CHECK(parsed({"--banana"}).error == "unknown option --banana; program --help lists all");
  CHECK(parsed({"pear"}).error ==
        "unexpected argument \"pear\"; program --help lists what there is");
  CHECK(parsed({"-n", "x"}).error.find("--group-size") != std::string::npos);
  CHECK(parsed({"--group-size"}).error.find("--group-size") != std::string::npos);
}

// What both kinds of options must do: CLI11, and tools/plain in its place.
struct Many {
  std::string error, text, file, model;
  std::vector<std::string> words;
  std::vector<int> numbers;
  std::optional<double> share;
  int64_t threads = 1;
  bool quiet = false, escape = false, shown = true;
  size_t texts = 0;
};

Many many(const Args& args) {
  Many m;
  CLI::App app("a test", "program");
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("-m,--model,model", m.model, "to run")->required();
  auto* text = app.add_option("-p,--prompt", m.text)->type_name("TEXT");
  app.add_option("-f,--file", m.file)->excludes(text);
  app.add_option("--word", m.words)->take_all()->allow_extra_args(false);
  app.add_option("--numbers", m.numbers)->delimiter(',');
  app.add_option("--share", m.share)->check(CLI::Range(0.0, 1.0));
  app.add_option("-t,--threads", m.threads)->check(CLI::PositiveNumber);
  app.add_flag("-q,--quiet", m.quiet);
  app.add_flag("-e,--escape", m.escape);
  app.add_flag("--shown,!--no-shown", m.shown);
  try {
    parse(app, args);
  } catch (const UsageError& e) {
    m.error = e.what();
  }
  m.texts = app.get_option("--prompt")->count();
  return m;
}

TEST_CASE("forms of options") {
  CHECK(many({"a"}).model == "a");
  CHECK(many({"-m", "a"}).model == "a");
  CHECK(many({"-ma", "-t4"}).threads == 4);
  CHECK(many({"--model=a", "--threads=+4"}).threads == 4);
  CHECK(many({"a", "-p", ""}).texts == 1);
  CHECK(many({"a", "-p", "-x"}).text == "-x");
  CHECK(many({"a", "-p", "x", "-p", "y z"}).text == "y z");
  CHECK(many({"a", "--word", "x", "--word", "y"}).words == Args{"x", "y"});
  CHECK(many({"--word", "x", "a"}).model == "a");
  CHECK(many({"a", "--numbers", "1,-2,3"}).numbers == std::vector<int>{1, -2, 3});
  CHECK(many({"a", "--numbers", "1", "2"}).numbers == std::vector<int>{1, 2});
  CHECK(many({"a", "--share", ".25"}).share == 0.25);
  CHECK(!many({"a"}).share);
  const Many both = many({"a", "-qe"});
  CHECK((both.quiet && both.escape && both.shown));
  CHECK(!many({"a", "--no-shown"}).shown);
  CHECK(!many({"a", "--shown=false"}).shown);
  CHECK(!many({"a", "--no-shown=true"}).shown);
  CHECK(many({"a", "--no-shown", "--no-shown=false"}).shown);
  CHECK(many({"--", "-a"}).model == "-a");
  for (const Args& good : {Args{"a"}, Args{"a", "-q"}}) CHECK(many(good).error.empty());
}

TEST_CASE("wrong options") {
  CHECK(many({}).error == "--model is required; program --help says more");
  // The option, and what is wrong with it.
  const auto says = [](const Args& args, std::string_view option, std::string_view what) {
    const std::string error = many(args).error;
    INFO(error);
    CHECK(error.find(option) != std::string::npos);
    CHECK(error.find(what) != std::string::npos);
  };
  says({"a", "-p", "x", "-f", "y"}, "--file", "excludes");
  says({"a", "--share", "1.5"}, "--share", "1.5 not in range");
  says({"a", "--threads", "0"}, "--threads", "0");
  says({"a", "-t", "3x"}, "--threads", "3x");
  says({"a", "-p"}, "--prompt", "required TEXT missing");
  says({"a", "b"}, "unexpected argument", "\"b\"");
  says({"a", "--quit"}, "unknown option --quit", "did you mean --quiet?");
}

TEST_CASE("nearest word") {
  const Args words = {"--temp", "--top-k", "--top-p", "--repeat-penalty"};
  CHECK(nearest("--tmep", words) == "--temp");
  CHECK(nearest("--topk", words) == "--top-k");
  CHECK(nearest("--repeat_penalti", words) == "--repeat-penalty");
  CHECK(nearest("--repeat", words) == "--repeat-penalty");
  CHECK(nearest("--completely-else", words) == std::nullopt);
}

TEST_CASE("lists of numbers") {
  CHECK(parse_int_list("1,2,16", "-t", 1) == std::vector<int64_t>{1, 2, 16});
  for (const char* wrong : {"", "1,", "1,,2", "a", "1 2", "0", "99999999999999999999"}) {
    CAPTURE(wrong);
    CHECK_THROWS_AS(parse_int_list(wrong, "-t", 1), UsageError);
  }
}

TEST_CASE("decimal numbers") {
  const auto is = [](std::string_view text, double value, size_t length) {
    CAPTURE(text);
    const std::optional<Decimal> got = decimal_at(text);
    REQUIRE(got);
    CHECK(got->value == value);
    CHECK(got->length == length);
  };
  is("1.5x", 1.5, 3);
  is("-.5", -0.5, 3);
  is("24G", 24, 2);
  is("1e3 ", 1000, 3);
  is("0x10", 0, 1);
  is("1e+10", 1e10, 5);
  is("1.5+2", 1.5, 3);
  is("-inf", -std::numeric_limits<double>::infinity(), 4);
  for (const char* none : {"", "G", " 1", "+1", "-", ".", "x", "in", "1e999"}) {
    CAPTURE(none);
    CHECK(!decimal_at(none));
  }
}

TEST_CASE("numbers for people") {
  CHECK(human_bytes(640) == "640 B");
  CHECK(human_bytes(1536) == "1.50 KiB");
  CHECK(human_bytes(98362432) == "93.8 MiB");
  CHECK(human_bytes(1.5 * 1024 * 1024 * 1024) == "1.50 GiB");
  CHECK(human_seconds(12.34) == "12.3 s");
  CHECK(human_seconds(242) == "4:02");
  CHECK(human_seconds(3723) == "1:02:03");
  CHECK(peak_memory_bytes() > 1000000);
}

TEST_CASE("sizes of memory") {
  CHECK(parse_memory("24G") == size_t{24} << 30);
  CHECK(parse_memory("512m") == size_t{512} << 20);
  CHECK(parse_memory("1.5GiB") == size_t{3} << 29);
  CHECK(parse_memory("64KB") == size_t{64} << 10);
  CHECK(parse_memory("1000000") == 1000000);
  for (const char* text : {"", "G", "-1G", "24X", "24Gb/s", "0", "inf", "1e30G", "nan"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(parse_memory(text), UsageError);
  }
}

TEST_CASE("exit codes") {
  char name[] = "test";
  char* argv[] = {name, nullptr};
  CHECK(run_program("test", 1, argv, [](const Args& args) { return args.empty() ? 0 : 9; }) == 0);
  CHECK(run_program("test", 1, argv, [](const Args&) -> int { fail("no luck"); }) == 1);
  CHECK(run_program("test", 1, argv, [](const Args&) -> int { throw UsageError("what?"); }) == 2);
}

}  // namespace
}  // namespace omq::cli
