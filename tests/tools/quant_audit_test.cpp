// omq-quant audit: it passes on small models, fails where an equivalence is none, and refuses what
// it cannot audit. What the checks themselves can find is in tests/quant/audit_test.cpp.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "tests/support/shared.h"
#include "tests/tools/workshop.h"

namespace omq {
namespace {

using nlohmann::json;

void check_passes(const std::string& arguments) {
  CAPTURE(arguments);
  const Outcome o = run_program("omq-quant", "audit " + arguments);
  CAPTURE(o.out);
  CAPTURE(o.err);
  CHECK(o.code == 0);
  CHECK(contains(o.out, " checks, all passed\n"));
}

}  // namespace

TEST_CASE("audit: a line a check, and all pass") {
  const Workshop w({.type = "qwen2"});
  const Outcome o = w.quant("audit --preset w4a4 -m " + w.path("model"));
  CAPTURE(o.out);
  REQUIRE(o.code == 0);
  CHECK(contains(o.out, "model.layers.1, omniquant"));
  CHECK(contains(o.out, "model.layers.1, rtn"));
  for (const char* check :
       {"gradient of lwc.gamma_logit", "gradient of let.qkv_shift", "gradient in F32, let",
        "equivalence of qkt", "equivalence of all sites", "packed = simulated", "codes in range",
        "packed kernels, 32 tokens"})
    CHECK(contains(o.out, check));
  CHECK(contains(o.err, "w4a4 of "));
  CHECK(contains(o.err, "32 random token ids"));
  for (size_t at = 0; at < o.out.size();) {
    const size_t end = o.out.find('\n', at);
    CHECK(end - at <= 102);  // 100 columns, of which one may be a character of three bytes
    at = end + 1;
  }
}

TEST_CASE("audit: settings, layers, methods, texts") {
  const Workshop w;
  const std::string m = "-m " + w.path("model") + " ";
  check_passes(m + "--wbits 2 --group-size 32 --layers all");
  check_passes(m + "--wbits 3 --symmetric --layer 0 --no-let");
  check_passes(m + "--wbits 6 --abits 8 --p-bits 8 --layers 0:1 --seed 7 --calib " +
               w.path("calib.txt"));
  write_file(w.dir / "ids.jsonl", "[1,2,3,4,5,6,7,8]\n");
  check_passes(m + "--method rtn --calib-ids " + w.path("ids.jsonl"));

  const Outcome o = w.quant("audit --json --layers all --wbits 4 " + m);
  REQUIRE(o.code == 0);
  const json j = json::parse(o.out);
  CHECK(j["failed"] == 0);
  std::set<std::string> blocks, methods;
  for (const json& c : j["checks"]) {
    blocks.insert(c["block"].get<std::string>());
    methods.insert(c["method"].get<std::string>());
    CHECK(c["passed"] == true);
    CHECK(c["worst"].get<double>() <= c["bound"].get<double>());
  }
  CHECK(blocks == std::set<std::string>{"model.layers.0", "model.layers.1"});
  for (const char* name : {"omniquant", "omniquant + let", "quarot", "flatquant", "rtn", "gptq",
                           "efficientqat", "norm-tweaking", "signround"}) {
    CAPTURE(name);
    CHECK(methods.contains(name));
  }
  const std::string only = w.quant("audit --method rtn " + m).out;
  CHECK(contains(only, "rtn"));
  CHECK_FALSE(contains(only, "omniquant"));
}

TEST_CASE("audit: the same seed gives the same figures on one and on two threads") {
  const Workshop w({.layers = 1});
  const std::string audit = "audit --json --preset w4a4 -m " + w.path("model");
  const std::string one = w.quant(audit + " -t 1").out;
  CHECK(one == w.quant(audit + " -t 2").out);
  CHECK(one != w.quant(audit + " --seed 3").out);
}

TEST_CASE("audit: what is no equivalence fails, with code 1") {
  const Workshop w;
  const Outcome o = w.quant("audit --preset w4a4 --untied-qk -m " + w.path("model"));
  CHECK(o.code == 1);
  CHECK(contains(o.out, "equivalence of qkt"));
  CHECK(contains(o.out, "FAILED\n      worst in token"));
  CHECK(contains(o.out, " FAILED\n"));
  CHECK_FALSE(contains(o.out, "checks, 0 FAILED"));
}

TEST_CASE("audit: what cannot be audited is refused by name") {
  const Workshop w;
  const std::string m = "audit -m " + w.path("model");
  w.check_refused(m + " --layer 2", 1, "layer 2: the model has layers 0 to 1");
  w.check_refused(m + " --layer -1", 1, "layer -1");
  w.check_refused(m + " --layers 1:3", 1, "layer 2: the model has layers 0 to 1");
  for (const char* layers : {"1", "1:1", "2:1", "a:b", "0:1x", ":", "0:"})
    w.check_refused(fmt::format("{} --layers {}", m, layers), 2, "a:b with a below b, or all");
  w.check_refused(m + " --layer 0 --layers all", 2, "exclude each other");
  w.check_refused(m + " --calib a --calib-ids b", 2, "exclude each other");
  w.check_refused(m + " --calib " + w.path("nowhere"), 1, "nowhere");
  w.check_refused(m + " --tokens 1", 2, "--tokens: at least 2");
  w.check_refused(m + " --wbits 9", 2, "wbits = 9");
  w.check_refused(m + " --laier 0", 2, "unknown option --laier, did you mean --layer?");
  w.check_refused("audit", 2, "-m MODEL is missing");
  w.check_refused("audit -m " + w.path("nowhere"), 1, "no such file or folder");
  REQUIRE(w.quant(fmt::format("--method rtn -m {} -o {}", w.path("model"), w.path("out"))).code ==
          0);
  w.check_refused("audit -m " + w.path("out"), 1, "is quantised already; audit the original");
  w.check_refused(m + " --tokens 129", 1, "--tokens 129: the model's context is 128");
  write_file(w.dir / "ids.jsonl", "[1,2,3,4]\n");
  w.check_refused(m + " --tokens 5 --calib-ids " + w.path("ids.jsonl"), 1,
                  "--tokens 5: a window of --calib-ids has 4");
  CHECK(contains(w.quant("--help").out, "omq-quant audit"));
  CHECK(contains(w.quant("audit --help").out, "--layers"));
}

TEST_CASE("audit: the bundled model passes") {
  const auto tiny = source_path("tests/fixtures/tiny-llama");
  for (const char* setting : {"--preset w4a4", "--preset w2a16g64", "--preset w3a16"})
    check_passes(fmt::format("{} -m '{}'", setting, tiny.string()));
}

TEST_CASE("audit: stories260K passes") {
  const auto file = shared_path("data/model-stories260k/stories260K.gguf");
  if (!file) {
    MESSAGE("skipped: no shared/data/model-stories260k");
    return;
  }
  check_passes(fmt::format("--preset w4a4 -m '{}'", file->string()));
}

TEST_CASE("slow: audit: SmolLM2 passes, at every kind of setting") {
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: no SmolLM2; make smollm2 fetches it");
    return;
  }
  for (const char* setting : {"--preset w4a4", "--preset w4a16g64", "--preset w2a16g64 --layer 0",
                              "--preset w6a6 --layer 29"})
    check_passes(fmt::format("{} -m '{}'", setting, file->string()));
}

}  // namespace omq
