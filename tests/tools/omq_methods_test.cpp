// Methods and their pieces on omq-quant's command line: what a line writes and reports, what it
// refuses, and that a packed model is what was simulated, whichever way its codes came about.
#include <doctest/doctest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/support/shared.h"
#include "tests/tools/workshop.h"

namespace omq {

using nlohmann::json;

TEST_CASE("omq-quant: every method by its name, with its line in report and model") {
  const Workshop w;
  const std::pair<const char*, const char*> lines[] = {
      {"flatquant", "--transform kronecker --clip lwc --round nearest --train clip"},
      {"gptq", "--transform none --clip minmax --round gptq --train none"},
      {"efficientqat", "--transform none --clip free --round nearest --train weights"},
      {"norm-tweaking", "--transform none --clip minmax --round gptq --train norms"},
      {"signround", "--transform none --clip scaled --round learned --train clip"},
  };
  for (const auto& [method, line] : lines) {
    CAPTURE(method);
    const char* const learning = contains(line, "--train none") ? "" : "--epochs 2 --batch-size 1";
    const Outcome o = w.quant(w.with_text(fmt::format(
        "--force --method {} {} --eval ppl:{} sim:{} --eval-context 64 --report {}", method,
        learning, w.path("test.txt"), w.path("test.txt"), w.path(std::string(method) + ".html"))));
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    const json r = w.report();
    CHECK(r["recipe"]["method"] == method);
    CHECK(r["recipe"]["line"] == line);
    const double packed = r["evaluation"][0]["perplexity"].get<double>(),
                 simulated = r["evaluation"][1]["perplexity"].get<double>();
    CHECK(std::abs(packed - simulated) <= 1e-4 * simulated);
    const json config = json::parse(read_file(w.dir / "out/config.json"));
    CHECK(config["quantization_config"]["method"] == method);
    CHECK(contains(read_file(w.dir / (std::string(method) + ".html")), line));
    const Outcome p = run_program(
        "omq-run", fmt::format("ppl --json -c 64 -m {} -f {}", w.path("out"), w.path("test.txt")));
    REQUIRE(p.code == 0);
    CHECK(json::parse(p.out)["perplexity"].get<double>() == packed);
  }
}

TEST_CASE("omq-quant: pieces win over the method, and what learns says at which rate") {
  const Workshop w({.layers = 1});
  REQUIRE(w.quant(w.quick("--method gptq --clip lwc --train clip --damping 0.05 --no-act-order "
                          "--rate lwc=0.02"))
              .code == 0);
  json recipe = w.report()["recipe"];
  CHECK(recipe["line"] == "--transform none --clip lwc --round gptq --train clip");
  CHECK(recipe["learning_rates"] == json{{"lwc", 0.02}});
  CHECK(recipe["solver"] == json{{"damping", 0.05}, {"act_order", false}});
  CHECK(recipe["epochs"] == 2);
  CHECK(json::parse(read_file(w.dir / "out/config.json"))["quantization_config"]["method"] ==
        "gptq --clip lwc --train clip");

  REQUIRE(w.quant(w.quick("--force --method efficientqat --rate weights=1e-4 grid=0.001 "
                          "--batch-size 3"))
              .code == 0);
  recipe = w.report()["recipe"];
  CHECK(recipe["learning_rates"] == json{{"grid", 0.001}, {"norms", 1e-4}, {"weights", 1e-4}});
  CHECK(recipe["schedule"]["rates"] == "cosine");
  CHECK(recipe["schedule"]["keeps"] == "best epoch");
  CHECK(recipe["batch_size"] == 3);
  CHECK(w.report()["blocks"][0]["kept_epoch"].get<int>() >= 1);

  REQUIRE(w.quant(w.with_text("--force --method rtn --transform let")).code == 0);
  CHECK(w.report()["recipe"]["epochs"] == 0);
  CHECK(w.report()["recipe"]["transformation"].is_object());
  CHECK_FALSE(w.report()["recipe"].contains("solver"));
}

TEST_CASE("omq-quant: lines that make no sense are code 2 and one sentence") {
  const Workshop w({.layers = 1});
  const std::pair<const char*, const char*> cases[] = {
      {"--transform spin", "--transform spin: there are: none, let"},
      {"--clip wide", "--clip wide: there are: minmax, mse, lwc, scaled, free"},
      {"--clip mse",
       "--clip mse: it is searched once, and --train clip would search at every step"},
      {"--round up", "--round up: there are: nearest, gptq, learned"},
      {"--train all", "--train all: there are: none, clip, weights, norms"},
      {"--method rtn --clip lwc", "--clip lwc: it is learned, but method rtn has --train none"},
      {"--method gptq --train clip", "have nothing to learn"},
      {"--method gptq --round learned", "--round learned: offsets learn with --train clip"},
      {"--method gptq --let", "--let: method gptq learns nothing of it"},
      {"--transform none --let", "--transform none and --let exclude each other"},
      {"--transform let --no-let", "--transform let and --no-let exclude each other"},
      {"--damping 0.1", "--damping: nothing is solved; add --round gptq"},
      {"--method rtn --no-act-order", "--no-act-order: nothing is solved"},
      {"--method gptq --damping 0", "--damping: above 0, at most 1"},
      {"--method gptq --damping nan", "--damping: above 0, at most 1"},
      {"--rate speed=1", "--rate speed=1: GROUP=X wanted, GROUP one of lwc, let"},
      {"--rate lwc", "--rate lwc: a number above 0 wanted"},
      {"--rate lwc=fast", "--rate lwc=fast: a number above 0 wanted"},
      {"--rate lwc=-1", "--rate lwc=-1: a number above 0 wanted"},
      {"--method efficientqat --symmetric --official-symmetric", "official symmetric grid"},
      {"--method gptq --let-shift", "--let-shift: there is no transformation to act on"},
  };
  for (const auto& [arguments, message] : cases)
    w.check_refused(fmt::format("-m x -o y {}", arguments), 2, message);
  w.check_refused(fmt::format("-m {} -o {} --method gptq", w.path("model"), w.path("out")), 2,
                  "method gptq looks at text: give --calib FILE");
}

TEST_CASE("omq-quant: a killed run of free weights goes on with the same bytes") {
  const Workshop w;
  const std::string line = "--method efficientqat --batch-size 1 ";
  REQUIRE(w.quant(w.quick(line)).code == 0);
  const std::string whole = read_file(w.dir / "out/model.safetensors");
  const std::string work = fmt::format("{} --force --work {}", line, w.path("work"));
  REQUIRE(w.quant(w.quick(work)).code == 0);
  std::filesystem::remove(w.dir / "work/block-0001.safetensors");
  const Outcome o = w.quant(w.quick(work));
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  CHECK(contains(o.err, "1 of 2 blocks are finished"));
  CHECK(read_file(w.dir / "out/model.safetensors") == whole);
  w.check_refused(w.quick(work + " --rate grid=1e-5"), 1, "settings.learning_rates.grid");
}

TEST_CASE("omq-quant: trace and audit know codes that are not the nearest") {
  const Workshop w({.layers = 1});
  for (const std::string line :
       {"--method gptq", "--method efficientqat --rate weights=0.01 --epochs 2",
        "--round gptq --epochs 2"}) {
    CAPTURE(line);
    REQUIRE(w.quant(w.with_text(line + " --force")).code == 0);
    const Outcome t =
        w.quant(fmt::format("trace -m {} --packed {} --row 5", w.path("model"), w.path("out")));
    CAPTURE(t.out);
    CAPTURE(t.err);
    CHECK(t.code == 0);
    CHECK(contains(t.out, "w below is not what was rounded"));
  }
  for (const std::string line : {"--method gptq", "--round gptq", "--method norm-tweaking"}) {
    const Outcome a = w.quant(
        fmt::format("audit -m {} {} --wbits 3 --group-size 32 --tokens 16", w.path("model"), line));
    CAPTURE(a.out);
    CHECK(a.code == 0);
    CHECK(contains(a.out, "solved < nearest"));
  }
}

}  // namespace omq
