// The manners that all programs share: option spelling, suggestions, numbers for people.
#include "tools/cli.h"

#include <doctest/doctest.h>
#include <CLI/CLI.hpp>

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
