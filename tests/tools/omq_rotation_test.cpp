// Rotated models, from omq-quant to omq-run: the printed figure is the one that runs, the online
// part is told and charged for, and what makes no sense is refused.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/support/shared.h"
#include "tests/tools/workshop.h"

namespace omq {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

double run_perplexity(const std::string& model, const std::string& more) {
  const Outcome o = run_program("omq-run", fmt::format("ppl -q --json -m {} {}", model, more));
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  return json::parse(o.out)["perplexity"].get<double>();
}

}  // namespace

TEST_CASE("omq-quant: a rotated model runs as it was simulated, and better than rounding alone") {
  const fs::path tiny = source_path("tests/fixtures/tiny-llama");
  const Workshop w;
  const std::string text = fmt::format("'{}/test.txt'", tiny.string());
  const auto quantised = [&](const std::string& method, const std::string& bits) {
    const Outcome o = w.quant(
        fmt::format("-m '{}' -o {} --force --method {} {} --eval-context 128 --eval-chunks 12 "
                    "--eval ppl:{} sim:{}",
                    tiny.string(), w.path("out"), method, bits, text, text));
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    CHECK(contains(o.err, "online: ") == (method == "quarot" && !contains(bits, "a16")));
    return w.report();
  };
  const auto perplexity = [](const json& report, int i) {
    return report["evaluation"][static_cast<size_t>(i)]["perplexity"].get<double>();
  };
  for (const std::string bits : {"--preset w4a4", "--preset w8a8 --rotation-seed 7"}) {
    CAPTURE(bits);
    const json report = quantised("quarot", bits);
    const double packed = perplexity(report, 0), simulated = perplexity(report, 1);
    CHECK(std::abs(packed - simulated) < 2e-3 * simulated);
    const std::string run = "-c 128 --chunks 12 -f " + text;
    CHECK(run_perplexity(w.path("out"), run) == packed);
    CHECK(run_perplexity(w.path("out"), run + " -t 2") == packed);
    CHECK(report["recipe"]["method"] == "quarot");
    CHECK(report["recipe"]["rotation"]["seed"] == (contains(bits, "seed") ? 7 : 0));
    CHECK(report["recipe"]["rotation"]["heads"] == true);
    CHECK(report["recipe"]["act_clip"] == 0.9);
    CHECK(report["recipe"]["qkv_clip"] == 0.95);
    // down: 288·(8 + 36); o: 96·6; q: 96·(4 + 4); k: 32·(4 + 4); twice each, in 4 blocks.
    const int64_t operations = 2 * (288 * 44 + 96 * 6 + 96 * 8 + 32 * 8);
    CHECK(report["online"]["operations_per_token_and_block"] == operations);
    CHECK(report["online"]["operations_per_token"] == 4 * operations);
    const double matrices = 2.0 * 96 * (2 * 96 + 2 * 32 + 3 * 288);
    CHECK(report["online"]["share_of_matrices"].get<double>() ==
          doctest::Approx(static_cast<double>(operations) / matrices));
    CHECK(report["kept"].size() == 2);  // embedding and head differ now
    if (contains(bits, "w4a4")) CHECK(packed < perplexity(quantised("rtn", bits), 0));
  }
}

TEST_CASE("omq-quant: what is written of a rotation, and what reads it") {
  const Workshop w({.type = "qwen2"});
  const auto quant = [&](const std::string& more) {
    const Outcome o = w.quant(fmt::format("-m {} -o {} --force --method quarot {}", w.path("model"),
                                          w.path("out"), more));
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    return json::parse(read_file(w.dir / "out/config.json"));
  };
  json config = quant("--wbits 4 --abits 6 --k-bits 4");
  CHECK(config["tie_word_embeddings"] == false);
  CHECK(config["quantization_config"]["omq_format"] == 4);
  CHECK(config["quantization_config"]["online_transforms"]["mlp.down_proj"] ==
        json{{"type", "kronecker"}, {"left", 8}, {"right", 9}});
  const json info = json::parse(run_program("omq-run", "info --json -m " + w.path("out")).out);
  CHECK(info["online_operations_per_token"] ==
        2 * 2 * (72 * 17 + 32 * 4 + 32 * (2 + 4) + 16 * (2 + 4)));
  const Outcome told = run_program("omq-run", "info -m " + w.path("out"));
  CHECK(contains(told.out,
                 "online        mlp.down_proj, self_attn.k, self_attn.o_proj, "
                 "self_attn.q; 0.00656 million operations a token"));
  const Outcome g = run_program("omq-run", "generate --temp 0 -n 20 -p abc -m " + w.path("out"));
  CHECK(g.code == 0);
  CHECK_FALSE(g.out.empty());
  const Outcome page = w.quant(fmt::format("report {} -o {}", w.path("out"), w.path("page.html")));
  CHECK(page.code == 0);
  const std::string html = read_file(w.dir / "page.html");
  CHECK(
      contains(html, "residual stream, values, across heads, before down_proj, queries and keys"));
  CHECK(contains(html, "million operations a token"));
  // A word that this version does not know.
  config["quantization_config"]["online_transforms"]["mlp.down_proj"]["type"] = "wavelet";
  write_file(w.dir / "out/config.json", config.dump());
  const Outcome o = run_program("omq-run", "info -m " + w.path("out"));
  CHECK(o.code == 1);
  CHECK(contains(o.err, "a transform of type \"wavelet\" is not known"));
  CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);

  // Weights alone: nothing stays online, and every program reads the file.
  config = quant("--wbits 3 --group-size 32");
  CHECK(config["tie_word_embeddings"] == false);
  CHECK(config["quantization_config"]["omq_format"] == 3);
  CHECK_FALSE(config["quantization_config"].contains("online_transforms"));
  CHECK_FALSE(w.report().contains("online"));
  CHECK(run_program("omq-run", "info -m " + w.path("out")).code == 0);
}

TEST_CASE("omq-quant: learned transforms and learned shares of activations run as simulated") {
  const Workshop w;
  const Outcome o = w.quant(w.quick(
      fmt::format("--force --method flatquant --abits 4 --batch-size 1 --train-inputs full "
                  "--schedule linear --keep-epoch best --eval ppl:{} sim:{} --eval-context 64",
                  w.path("test.txt"), w.path("test.txt"))));
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  CHECK(contains(o.err, "online: "));
  const json r = w.report(), config = json::parse(read_file(w.dir / "out/config.json"));
  CHECK(config["quantization_config"]["omq_format"] == 4);
  CHECK(config["quantization_config"]["learned_activation_clips"] == true);
  CHECK(config["quantization_config"]["online_transforms"].size() == 9);
  CHECK(r["recipe"]["learned_act_clips"] == true);
  CHECK(r["recipe"]["learning_rates"].contains("lac"));
  CHECK(r["recipe"]["inputs"] == "full precision");
  CHECK(r["recipe"]["schedule"]["rates"] == "linear");
  CHECK(r["recipe"]["schedule"]["keeps"] == "best epoch");
  const double packed = r["evaluation"][0]["perplexity"].get<double>(),
               simulated = r["evaluation"][1]["perplexity"].get<double>();
  CHECK(std::abs(packed - simulated) < 2e-3 * simulated);
  CHECK(run_perplexity(w.path("out"), "-c 64 -f " + w.path("test.txt")) == packed);
  for (const auto& [options, why] :
       {std::pair{"--method flatquant --learn-act-clip", "inputs of matrices are not quantised"},
        {"--method rtn --abits 4 --learn-act-clip", "has --train none"},
        {"--method quarot --abits 4 --transform kronecker --clip lwc --train clip",
         "take --method flatquant"},
        {"--method flatquant --let", "exclude each other"},
        {"--method rtn --train-inputs full", "method rtn learns nothing"},
        {"--method rtn --schedule cosine", "--schedule: method rtn learns nothing"},
        {"--method rtn --keep-epoch best", "--keep-epoch: method rtn learns nothing"},
        {"--schedule step", "--schedule step: one of constant, linear, cosine wanted"}}) {
    const Outcome refused = w.quant(w.with_text(std::string("--force ") + options));
    CAPTURE(refused.err);
    CHECK(refused.code == 2);
    CHECK(contains(refused.err, why));
  }
}

TEST_CASE("omq-quant: the same seed gives the same bytes, resumed or not") {
  const Workshop w;
  const auto sha = [&](const std::string& more) {
    const Outcome o = w.quant(fmt::format("-m {} -o {} --force --method quarot --preset w4a4 {}",
                                          w.path("model"), w.path("out"), more));
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    return w.report()["model_sha256"].get<std::string>();
  };
  const std::string first = sha("");
  CHECK(sha("-t 2") == first);
  CHECK(sha("--rotation-seed 1") != first);
  const std::string work = "--work " + w.path("work");
  CHECK(sha(work) == first);
  CHECK(sha(work) == first);
  // Blocks of another rotation are not taken.
  const Outcome o =
      w.quant(fmt::format("-m {} -o {} --force --method quarot --preset w4a4 --rotation-seed 1 {}",
                          w.path("model"), w.path("out"), work));
  CHECK(o.code == 1);
}

TEST_CASE("omq-quant: quarot and options that do not go together") {
  const Workshop w;
  const std::string m = fmt::format("-m {} -o {} --preset w4a4 ", w.path("model"), w.path("out"));
  w.check_refused(m + "--method quarot --let", 2, "--let: method quarot learns nothing");
  w.check_refused(m + "--method quarot --let-up-down", 2, "there is no transformation to act on");
  w.check_refused(m + "--method rtn --rotation-seed 1", 2,
                  "--rotation-seed: method rtn rotates nothing");
  w.check_refused(m + "--method rtn --rotate norms", 2, "--rotate: method rtn rotates nothing");
  w.check_refused(m + "--method quarot --rotate x", 2, "--rotate x: residual or norms wanted");
  w.check_refused(m + "--method quarot --rotation-seed -1", 2, "--rotation-seed: 0 or more");
  w.check_refused(m + "--method quarot --act-clip 1.5", 2, "--act-clip: above 0 and at most 1");
  w.check_refused(m + "--abits 16 --qkv-clip 0.9", 2, "q, k and v are not quantised");
  w.check_refused(m + "--abits 16 --act-clip 0.9", 2, "inputs of matrices are not quantised");
  w.check_refused("trace --method quarot -m " + w.path("model"), 1,
                  "method quarot rotates the network before it rounds");
  REQUIRE(w.quant(m + "--method quarot").code == 0);
  const Outcome o = w.quant(
      fmt::format("trace -m {} --packed {} --linear down_proj", w.path("model"), w.path("out")));
  CHECK(o.code == 0);
}

TEST_CASE("audit: rotations of the bundled model, part by part") {
  const auto tiny = source_path("tests/fixtures/tiny-llama");
  const Outcome o = run_program(
      "omq-quant", fmt::format("audit --method quarot --preset w4a4 -m '{}'", tiny.string()));
  CAPTURE(o.out);
  CHECK(o.code == 0);
  for (const char* part : {"residual", "values", "heads", "down", "query_key"})
    CHECK(contains(o.out, fmt::format("rotation of {}", part)));
  CHECK(contains(o.out, "all rotations"));
  CHECK(contains(o.out, " checks, all passed\n"));
}

}  // namespace omq
