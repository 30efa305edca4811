// Models with quantised activations, from omq-quant to omq-run: the figure that the written model
// gives is one of integers, the same in both programs, and that of the simulation up to codes that
// fall to the other side of a tie.
#include <doctest/doctest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "models/safetensors.h"
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

TEST_CASE("omq-quant: quantised activations are run as they were simulated") {
  const fs::path tiny = source_path("tests/fixtures/tiny-llama");
  const Workshop w;
  const std::string text = fmt::format("'{}/test.txt'", tiny.string());
  struct Setting {
    const char* bits;
    int k_bits;
    int64_t cache_bytes;  // 4 layers, 2 heads of 16, keys and values
  };
  for (const Setting& s : {Setting{"--preset w4a4", 4, 4 * 2 * 2 * (8 + 8)},
                           Setting{"--preset w8a8 --k-bits 4", 4, 4 * 2 * (8 + 8 + 16 + 8)},
                           Setting{"--preset w4a16g32 --k-bits 6", 6, 4 * 2 * (16 + 8 + 64)}}) {
    CAPTURE(s.bits);
    const Outcome o = w.quant(
        fmt::format("-m '{}' -o {} --force --method rtn {} --eval-context 128 --eval-chunks 12 "
                    "--eval ppl:{} sim:{}",
                    tiny.string(), w.path("out"), s.bits, text, text));
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    const json evaluation = w.report()["evaluation"];
    const double packed = evaluation[0]["perplexity"].get<double>();
    const double simulated = evaluation[1]["perplexity"].get<double>();
    CHECK(std::abs(packed - simulated) < 2e-3 * simulated);
    const std::string run = "-c 128 --chunks 12 -f " + text;
    CHECK(run_perplexity(w.path("out"), run) == packed);
    CHECK(run_perplexity(w.path("out"), run + " -t 2") == packed);
    const json info = json::parse(run_program("omq-run", "info --json -m " + w.path("out")).out);
    CHECK(info["quantization"]["k_bits"] == s.k_bits);
    CHECK(info["cache"]["type_k"] == fmt::format("u{}", s.k_bits));
    CHECK(info["cache"]["bytes_per_token"] == s.cache_bytes);
    // What attention quantises itself is kept as it reads it.
    const std::string generate =
        "generate -q --temp 0 -n 2 -p Once --device cpu -m " + w.path("out");
    const Outcome other = run_program("omq-run", generate + " -ctk int8");
    CHECK(other.code == 2);
    CHECK(contains(other.err, fmt::format("this model keeps codes of {} bits there", s.k_bits)));
    CHECK(run_program("omq-run", generate + fmt::format("{}", s.k_bits == 4 ? " -ctk q4_0" : ""))
              .code == 0);
    // With the word about activations taken away, the same weights give another figure.
    json config = json::parse(read_file(w.dir / "out/config.json"));
    for (const char* key : {"activation_bits", "q_bits", "k_bits", "v_bits"})
      config["quantization_config"][key] = 16;
    write_file(w.dir / "out/config.json", config.dump());
    CHECK(run_perplexity(w.path("out"), run) != packed);
  }
}

TEST_CASE("omq-quant: a learned transformation with shifts, activations in integers") {
  const Workshop w;
  const Outcome o =
      w.quant(w.quick(fmt::format("--abits 6 --let-shift --eval-context 64 --eval ppl:{} sim:{}",
                                  w.path("test.txt"), w.path("test.txt"))));
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  const json report = w.report();
  const double packed = report["evaluation"][0]["perplexity"].get<double>();
  const double simulated = report["evaluation"][1]["perplexity"].get<double>();
  CHECK(std::abs(packed - simulated) < 5e-3 * simulated);
  for (const json& b : report["blocks"]) CHECK(b["packed_error"].get<double>() < 1e-5);
  const SafetensorsFile file(w.dir / "out/model.safetensors");
  for (const char* name : {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj",
                           "self_attn.o_proj", "mlp.gate_proj"})
    CHECK(file.find(fmt::format("model.layers.1.{}.bias", name)) != nullptr);
  CHECK(run_perplexity(w.path("out"), "-c 64 -f " + w.path("test.txt")) == packed);
  const Outcome g = run_program("omq-run", "generate --temp 0 -n 20 -p abc -m " + w.path("out"));
  CHECK(g.code == 0);
  CHECK_FALSE(g.out.empty());
  const json bench = json::parse(
      run_program("omq-run", "bench -q -p 8 -n 4 -r 1 -o json -m " + w.path("out")).out);
  CHECK(bench[0]["type_k"] == "u6");
  const Outcome info = run_program("omq-run", "info -m " + w.path("out"));
  CHECK(contains(info.out,
                 "into matrices 6 bits, queries 6 bits, keys 6 bits, values 6 bits; products in "
                 "integers"));
  CHECK(contains(info.out, "keys u6, values u6, 128 B a token"));
}

}  // namespace omq
