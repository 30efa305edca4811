// omq-quant as its users meet it: what it writes, what it prints where, what it refuses with which
// exit code, and that a failure leaves nothing behind. The model is random and tiny.
#include <doctest/doctest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "models/hash.h"
#include "tensor/numeric.h"
#include "tests/support/shared.h"
#include "tests/tools/workshop.h"

namespace omq {

namespace fs = std::filesystem;
using nlohmann::json;

TEST_CASE("omq-quant: a whole folder, and a stdout of results alone") {
  const Workshop w;
  const Outcome o = w.quant(w.quick(fmt::format("--eval ppl:{} sim:{} --eval-context 64",
                                                w.path("test.txt"), w.path("test.txt"))));
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  for (const std::string name : {"config.json", "model.safetensors", "tokenizer.json",
                                 "tokenizer_config.json", "report.json"})
    CHECK(fs::is_regular_file(w.dir / "out" / name));
  CHECK(w.dir.entries() == 4);  // model, two texts, out
  CHECK(contains(o.err, "block 2/2"));
  CHECK(contains(o.err, "loss "));
  CHECK(contains(o.err, "ETA "));
  CHECK(contains(o.err, "bits a weight"));

  const json report = w.report();
  REQUIRE(report["evaluation"].size() == 2);
  const double packed = report["evaluation"][0]["perplexity"].get<double>();
  const double simulated = report["evaluation"][1]["perplexity"].get<double>();
  CHECK(o.out ==
        fmt::format("perplexity {:.6f}  (gptq, {} windows of 64, {} tokens, {})\n"
                    "simulated perplexity {:.6f}  (gptq, {} windows of 64, {} tokens, {})\n",
                    packed, report["evaluation"][0]["windows"].get<int>(),
                    report["evaluation"][0]["tokens"].get<int>(), (w.dir / "test.txt").string(),
                    simulated, report["evaluation"][1]["windows"].get<int>(),
                    report["evaluation"][1]["tokens"].get<int>(), (w.dir / "test.txt").string()));
  CHECK(std::abs(packed - simulated) <= 1e-4 * simulated);

  // omq-run finds the same, from the folder and from its one file elsewhere.
  fs::create_directories(w.dir / "elsewhere");
  fs::copy(w.dir / "out/model.safetensors", w.dir / "elsewhere/m.safetensors");
  for (const std::string name : {"out", "elsewhere/m.safetensors"}) {
    CAPTURE(name);
    const Outcome p = run_program(
        "omq-run", fmt::format("ppl --json -c 64 -m {} -f {}", w.path(name), w.path("test.txt")));
    CAPTURE(p.err);
    REQUIRE(p.code == 0);
    CHECK(json::parse(p.out)["perplexity"].get<double>() == packed);
  }
}

TEST_CASE("omq-quant: the report") {
  const Workshop w;
  REQUIRE(w.quant(w.quick("--aug-loss --keep lm_head=f16 --threads 1")).code == 0);
  const json r = w.report();
  const json& recipe = r["recipe"];
  CHECK(recipe["method"] == "omniquant");
  CHECK(recipe["setting"] == "w3a16g32");
  CHECK(recipe["epochs"] == 2);
  CHECK(recipe["seed"] == 2);
  CHECK(recipe["augmented_loss"] == true);
  CHECK(recipe["learning_rates"]["lwc"] == 0.01);
  CHECK(recipe["calibration"]["windows"] == 3);
  CHECK(recipe["calibration"]["tokens"] == 24);
  CHECK(recipe["calibration"]["ids_sha256"].get<std::string>().size() == 64);
  CHECK(contains(recipe["calibration"]["source"].get<std::string>(), "calib.txt"));
  CHECK(r["kept"] == json{{"model.embed_tokens", "f16"}});  // tied: one table, by either name
  CHECK(r["threads"] == 1);
  CHECK(r["evaluation"].empty());
  CHECK(r["model_sha256"] == sha256_file(w.dir / "out/model.safetensors"));
  REQUIRE(r["source"].size() == 2);
  for (const json& f : r["source"])
    CHECK(f["sha256"] == sha256_file(w.dir / "model" / f["file"].get<std::string>()));
  CHECK(r["size"]["bits_per_weight"].get<double>() >
        r["size"]["block_bits_per_weight"].get<double>());
  CHECK(r["size"]["weight_bytes"].get<int64_t>() > 0);
  CHECK(r["peak_memory_bytes"].get<int64_t>() > 0);
  REQUIRE(r["blocks"].size() == 2);
  for (const json& b : r["blocks"]) {
    CHECK(b["epoch_loss"].size() == 2);
    CHECK(b["epoch_loss"][1].get<double>() > 0);
    CHECK(b["committed_loss"].get<double>() > 0);
    CHECK(b["packed_error"].get<double>() < 1e-3);
    CHECK(b.contains("seconds"));
  }
  CHECK(r["blocks"][1]["block"] == "model.layers.1");
  const json config = json::parse(read_file(w.dir / "out/config.json"));
  CHECK(config["quantization_config"]["quant_method"] == "omq");
  CHECK(config["quantization_config"]["bits"] == 3);
  CHECK(config["hidden_size"] == kRandomHidden);
}

TEST_CASE(
    "omq-quant: the loss, the weight of its second part and the clip search change what is "
    "learned") {
  const Workshop w;
  std::vector<std::string> models;
  for (const std::string more :
       {"--aug-loss", "--aug-loss --aug-weight 1 --force", "--aug-loss --aug-weight 0.5 --force",
        "--aug-loss --clip-search --force", "--aug-loss --no-token-loss --force"}) {
    REQUIRE(w.quant(w.quick(more)).code == 0);
    models.push_back(read_file(w.dir / "out/model.safetensors"));
    const json r = w.report()["recipe"];
    CHECK(r.value("augmented_loss_weight", 1.0) == (contains(more, "0.5") ? 0.5 : 1.0));
    CHECK(r.contains("clip_search") == contains(more, "--clip-search"));
    CHECK(r.contains("token_loss") == !contains(more, "--no-token-loss"));
  }
  CHECK(models[0] == models[1]);
  CHECK(models[0] != models[2]);
  CHECK(models[0] != models[3]);
  CHECK(models[0] != models[4]);
  w.check_refused(fmt::format("-m {} -o {} --epochs 0 --clip-search", w.path("model"), w.path("n")),
                  2, "looks at text");
}

TEST_CASE("omq-quant: the same seed gives the same bytes on one and on two threads") {
  const Workshop w;
  std::vector<std::string> models;
  for (const std::string more :
       {"--threads 1", "--threads 2 --force", "--threads 1 --seed 3 --force"}) {
    REQUIRE(w.quant(w.quick(more)).code == 0);
    models.push_back(read_file(w.dir / "out/model.safetensors"));
  }
  CHECK(models[0] == models[1]);
  CHECK(models[0] != models[2]);
}

TEST_CASE("omq-quant: an existing folder is replaced only when told, and only when it is a model") {
  const Workshop w;
  fs::create_directories(w.dir / "out");
  write_file(w.dir / "out/config.json", "old");
  w.check_refused(w.quick(), 1, "it exists; choose another name or pass --force");
  CHECK(read_file(w.dir / "out/config.json") == "old");
  REQUIRE(w.quant(w.quick("--force")).code == 0);
  CHECK(read_file(w.dir / "out/config.json") != "old");
  CHECK(w.dir.entries() == 4);

  fs::create_directories(w.dir / "home");
  write_file(w.dir / "home/letter.txt", "dear");
  w.check_refused(w.quick(fmt::format("-o {} --force", w.path("home"))), 2, "");  // given twice
  const std::string elsewhere = fmt::format("-m {} --method rtn --force -o ", w.path("model"));
  w.check_refused(elsewhere + w.path("home"), 1, "not replaced even with --force");
  w.check_refused(elsewhere + w.path("model"), 1, "holds the model that is to be quantised");
  w.check_refused(elsewhere + w.path("nowhere/out"), 1, "does not exist");
  CHECK(fs::exists(w.dir / "home/letter.txt"));
}

TEST_CASE("omq-quant: what was quantised once is not quantised again") {
  const Workshop w;
  REQUIRE(w.quant(w.quick()).code == 0);
  w.check_refused(fmt::format("-m {} -o {} --method rtn", w.path("out"), w.path("again")), 1,
                  "is quantised already; quantise the original");
}

TEST_CASE("omq-quant: one matrix has one form") {
  const Workshop w({.layers = 1});
  const std::string rtn = fmt::format("--method rtn -m {} -o {} ", w.path("model"), w.path("out"));
  w.check_refused(rtn + "--keep embed_tokens=w8 --keep lm_head=w4", 1, "has one matrix for both");
  CHECK(w.quant(rtn + "--keep embed_tokens=w4 --keep lm_head=w4").code == 0);
}

TEST_CASE("omq-quant: names of files may be of any bytes") {
  const Workshop w({.layers = 1});
  fs::rename(w.dir / "model", w.dir / "mod\xe9l");
  fs::rename(w.dir / "calib.txt", w.dir / "t\xe9xt");
  const Outcome o =
      w.quant(fmt::format("-m {} -o {} --calib {} --nsamples 3 --seqlen 24 "
                          "--epochs 1 --work {}",
                          w.path("mod\xe9l"), w.path("out"), w.path("t\xe9xt"), w.path("work")));
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  CHECK(contains(w.report()["model"]["name"].get<std::string>(), "mod\uFFFDl"));
  fs::rename(w.dir / "out", w.dir / "o\xfft");
  for (const std::string& command :
       {"info --json -m " + w.path("o\xfft"),
        fmt::format("ppl --json -m {} -f {} -c 64", w.path("o\xfft"), w.path("t\xe9xt"))}) {
    const Outcome run = run_program("omq-run", command);
    CAPTURE(run.err);
    CHECK(run.code == 0);
    CHECK(json::parse(run.out).is_object());
  }
}

TEST_CASE("omq-quant: round-to-nearest needs no text; widths, tables, GGUF") {
  const Workshop w({.tied = false, .layers = 1});
  const std::string rtn =
      fmt::format("--method rtn -m {} -o {} --force ", w.path("model"), w.path("out"));
  for (const std::string more : {"--wbits 2", "--wbits 8 --symmetric", "--wbits 5 --group-size 40",
                                 "--preset w3a16g32", "--preset w4a16 --wbits 2 --group_size -1",
                                 "--keep lm_head=f16 embed_tokens=w4g32", "--keep lm_head=w2"}) {
    CAPTURE(more);
    const Outcome o = w.quant(rtn + more);
    CAPTURE(o.err);
    CHECK(o.code == 0);
    CHECK(o.out.empty());
  }
  CHECK(w.report()["kept"] == json{{"lm_head", "w2g128"}, {"model.embed_tokens", "w8g128"}});
  CHECK_FALSE(w.report()["recipe"].contains("calibration"));
  w.quant(rtn + "--preset w4a16g64 --wbits 3 -q");  // flags win over presets
  CHECK(w.report()["recipe"]["setting"] == "w3a16g64");

  write_file(w.dir / "m.gguf", tiny_gguf().build());
  const Outcome o = w.quant(fmt::format("--method rtn -m {} -o {}", w.path("m.gguf"), w.path("g")));
  CAPTURE(o.err);
  CHECK(o.code == 0);
  for (const std::string name : {"config.json", "tokenizer.json", "tokenizer_config.json"})
    CHECK(fs::exists(w.dir / "g" / name));
}

TEST_CASE("omq-quant: token ids instead of text; windows as long as the model allows") {
  const Workshop w({.layers = 1});
  write_file(w.dir / "ids.jsonl", "[1,2,3,4]\n[5,6,7,8]\n[9,10,11,12]\n");
  const std::string base =
      fmt::format("-m {} -o {} --epochs 1 --wbits 3 --force ", w.path("model"), w.path("out"));
  REQUIRE(w.quant(base + "--calib-ids " + w.path("ids.jsonl")).code == 0);
  CHECK(w.report()["recipe"]["calibration"]["windows"] == 3);
  REQUIRE(w.quant(base + "--nsamples 2 --calib-ids " + w.path("ids.jsonl")).code == 0);
  CHECK(w.report()["recipe"]["calibration"]["windows"] == 2);
  const Outcome o = w.quant(base + "--nsamples 1 --calib " + w.path("calib.txt"));
  CHECK(o.code == 0);
  CHECK(contains(o.err, "windows of 128 tokens: the model's context"));
  CHECK(w.report()["recipe"]["calibration"]["tokens"] == 128);

  write_file(w.dir / "ids.jsonl", "[1,2,300,4]\n");
  w.check_refused(base + "--calib-ids " + w.path("ids.jsonl"), 1,
                  "300 is not a token id below 257");
}

TEST_CASE("omq-quant: wrong usage is code 2, and names what was meant") {
  const Workshop w;
  struct Case {
    const char *arguments, *message;
  };
  const Case cases[] = {
      {"-o x", "-m MODEL is missing"},
      {"-m x", "-o OUTDIR is missing"},
      {"-m x -o y --wbit 3", "unknown option --wbit, did you mean --wbits?"},
      {"-m x -o y --group_sise 3", "did you mean --group-size?"},
      {"-m x -o y extra", "extra"},
      {"-m x -o y --method awq", "unknown method \"awq\"; there are: omniquant, "},
      {"-m x -o y --wbits 9", "wbits = 9: 2 to 8 are supported"},
      {"-m x -o y --wbits four", "--wbits"},
      {"-m x -o y --abits 9", "abits = 9: 2 to 8, or 16"},
      {"-m x -o y --k-bits 1", "k_bits = 1: 2 to 8, or 16"},
      {"-m x -o y --p_bits 12", "p_bits = 12: 2 to 8, or 16"},
      {"-m x -o y --preset w4a12", "activations of 12 bits, 2 to 8 or 16 wanted"},
      {"-m x -o y --preset best", "quantisation setting \"best\""},
      {"-m x -o y --group-size -7", "group size -7"},
      {"-m x -o y --nsamples 0", "--nsamples: at least 1"},
      {"-m x -o y --seqlen 1", "--seqlen: at least 2"},
      {"-m x -o y --epochs -3", "--epochs"},
      {"-m x -o y --batch-size 0", "--batch-size"},
      {"-m x -o y --lwc-lr 0", "--lwc-lr"},
      {"-m x -o y --lwc-lr nan", "--lwc-lr"},
      {"-m x -o y --wd -1", "--wd"},
      {"-m x -o y --seed -1", "--seed"},
      {"-m x -o y --keep lm_head", "--keep lm_head: lm_head=FORM"},
      {"-m x -o y --keep norm=f16", "--keep norm=f16"},
      {"-m x -o y --keep lm_head=w9", "--keep: \"w9\" is not f16 or wN or wNgM"},
      {"-m x -o y --eval acc:file", "--eval acc:file: ppl:FILE or sim:FILE wanted"},
      {"-m x -o y --eval ppl:", "--eval ppl:: ppl:FILE or sim:FILE wanted; the name of the file"},
      {"-m x -o y --calib ''", "--calib: the name of a file is empty"},
      {"-m x -o y --aug-loss --no-aug-loss", "exclude each other"},
      {"-m x -o y --aug-weight 2", "--aug-weight: there is no augmented loss to weigh"},
      {"-m x -o y --method rtn --token-loss",
       "--token-loss: method rtn learns from no block's error here"},
      {"-m x -o y --token-loss --no-token-loss",
       "--token-loss and --no-token-loss exclude each other"},
      {"-m x -o y --aug-loss --aug-weight 0", "--aug-weight: above 0"},
      {"-m x -o y --aug-loss --aug-weight nan", "--aug-weight: above 0"},
      {"-m x -o y --method rtn --clip-search", "--clip-search: method rtn has no clipping factors"},
      {"-m x -o y --calib a --calib-ids b", "exclude each other"},
      {"-m x -o y --let --no-let", "--let and --no-let exclude each other"},
      {"-m x -o y --let --let-shift --no-let-shift", "exclude each other"},
      {"-m x -o y --let-shift", "--let-shift: there is no transformation to act on; add --let"},
      {"-m x -o y --preset w4a4 --no-let --untied-qk", "--untied-qk: there is no transformation"},
      {"-m x -o y --let-up-down", "--let-up-down: there is no transformation"},
      {"-m x -o y --official-symmetric", "a kind of --symmetric, which is missing"},
      {"-m x -o y --method rtn --let", "--let: method rtn learns nothing"},
      {"-m x -o y --let --let-lr 0", "--let-lr: above 0"},
      {"-m x -o y --let --alpha 1.5", "--alpha: 0 to 1"},
      {"-m x -o y --let --alpha nan", "--alpha: 0 to 1"},
      {"-m x -o y --limit 3", "--limit: there it divides by windows that were not run"},
      {"-m x -o y --calib_dataset wikitext2", "nothing is downloaded here"},
      {"-m x -o y --eval_ppl", "name the text: --eval ppl:FILE"},
      {"-m x -o y --resume file", "--work DIR goes on"},
      {"-m x -o y --tasks piqa", "--tasks"},
      {"-m x -o y --disable_zero_point", "--symmetric"},
  };
  for (const Case& c : cases) w.check_refused(c.arguments, 2, c.message);
}

TEST_CASE("omq-quant: help, version and the methods go to stdout") {
  const Workshop w;
  for (const std::string arguments : {"--help", "--version", "--list-methods"}) {
    const Outcome o = w.quant(arguments);
    CHECK(o.code == 0);
    CHECK_FALSE(o.out.empty());
    CHECK(o.err.empty());
  }
  CHECK(contains(w.quant("--list-methods").out, "rtn"));
  CHECK(contains(w.quant("--help").out, "--group-size"));
  CHECK(contains(w.quant("--help").out, "GGUF file (required)"));
}

TEST_CASE("omq-quant: the official project's names, with _ and with -") {
  const Workshop w({.layers = 1});
  const Outcome o = w.quant(fmt::format(
      "--model {} --output_dir {} --wbits 3 --abits 16 --group_size 32 --lwc --let --aug_loss "
      "--lwc_lr "
      "1e-2 --let_lr 5e-3 --wd 0 --alpha 0.5 --epochs 1 --nsamples 2 --seqlen 8 --batch_size 1 "
      "--seed 2 --net llama-7b --real_quant --deactive_amp --cache_dir cache --calib {}",
      w.path("model"), w.path("out"), w.path("calib.txt")));
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  CHECK(w.report()["recipe"]["augmented_loss"] == true);
  for (const std::string flag : {"--lwc", "--net", "--real-quant", "--deactive-amp", "--cache-dir"})
    CHECK(contains(o.err, flag + ": no effect: "));
  const Outcome s =
      w.quant(fmt::format("--model {} --output_dir log --save_dir {} --wbits 3 --epochs 0",
                          w.path("model"), w.path("s")));
  CAPTURE(s.err);
  CHECK(s.code == 0);
  CHECK(fs::exists(w.dir / "s/config.json"));
}

TEST_CASE("omq-quant: texts that are missing or too short cost nothing") {
  const Workshop w;
  const std::string base = fmt::format("-m {} -o {} --epochs 1 ", w.path("model"), w.path("out"));
  w.check_refused(base, 2, "method omniquant learns from text: give --calib FILE");
  w.check_refused(base + "--calib /nowhere/text", 1, "/nowhere/text: no such file");
  w.check_refused(base + "--seqlen 500 --calib " + w.path("calib.txt"), 1,
                  "--seqlen 500: the model's context is 128");
  write_file(w.dir / "short.txt", "only these few words");
  w.check_refused(base + "--seqlen 64 --calib " + w.path("short.txt"), 1,
                  "20 tokens, one calibration window needs 65");
  w.check_refused(base + "--calib-ids /nowhere/ids", 1, "/nowhere/ids: no such file");
  w.check_refused(w.quick("--eval ppl:/nowhere/test"), 1, "/nowhere/test: no such file");
  w.check_refused(w.quick("--batch-size 9"), 1,
                  "3 calibration windows, a step takes 9 (--nsamples, --batch-size)");
}

TEST_CASE("omq-quant: an evaluation that fails does not take the model with it") {
  const Workshop w({.layers = 1});
  write_file(w.dir / "short.txt", "only these few words");
  w.check_refused(w.quick("--eval ppl:" + w.path("short.txt")), 1,
                  "short.txt: a text of 20 bytes, less than one window of 128 tokens");
  w.check_refused(w.quick("--eval-context 129 --eval ppl:" + w.path("test.txt")), 1,
                  "--eval-context 129: the model was made for 128");
  // A blank row's spaces are no text: bytes enough, but too few tokens.
  write_file(w.dir / "short.txt", "only these few words\n" + std::string(200, ' ') + "\n");
  const Outcome o = w.quant(w.quick("--eval ppl:" + w.path("short.txt")));
  CAPTURE(o.err);
  CHECK(o.code == 1);
  CHECK(o.out.empty());
  CHECK(contains(o.err, "short.txt"));
  CHECK(contains(o.err, "less than one window"));
  CHECK(w.report()["blocks"].size() == 1);
  CHECK(run_program("omq-run", "info -m " + w.path("out")).code == 0);
}

TEST_CASE("omq-quant: models that are broken") {
  const auto refused = [](const RandomModel& model, std::string_view message) {
    const Workshop w(model);
    w.check_refused(w.quick(), 1, message);
    w.check_refused(fmt::format("--method rtn -m {} -o {}", w.path("model"), w.path("out")), 1,
                    message);
  };
  const std::string up = "model.layers.1.mlp.up_proj.weight";
  for (const std::string tensor : {"model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight",
                                   "model.norm.weight", "model.layers.0.input_layernorm.weight"}) {
    refused({.edit =
                 [&](const std::string& name, Tensor& t) {
                   if (name == tensor) t.data<float>()[5] = std::nanf("");
                   return true;
                 }},
            std::string("tensor ") + tensor + ": value 5 of");
    refused({.edit = [&](const std::string& name, Tensor&) { return name != tensor; }},
            std::string("no tensor ") + tensor);
  }
  refused({.edit =
               [&](const std::string& name, Tensor& t) {
                 if (name == up) t = Tensor::zeros({3, 3});
                 return true;
               }},
          "tensor " + up + " has shape [3, 3], the configuration asks for [72, 32]");

  const Workshop w;
  const std::string whole = read_file(w.dir / "model/model.safetensors");
  for (const size_t size :
       {size_t{0}, size_t{5}, size_t{300}, whole.size() / 2, whole.size() - 1}) {
    write_file(w.dir / "model/model.safetensors", whole.substr(0, size));
    w.check_refused(w.quick(), 1, "model.safetensors");
  }
  write_file(w.dir / "model/model.safetensors", whole);
  write_file(w.dir / "model/tokenizer.json", "{");
  w.check_refused(w.quick(), 1, "tokenizer.json");
  write_file(w.dir / "model/config.json", "{\"model_type\": \"mamba\"}");
  w.check_refused(w.quick(), 1, "mamba");
  w.check_refused(fmt::format("-m {} -o {}", w.path("nothing"), w.path("out")), 1,
                  "no such file or folder");
}

TEST_CASE("omq-quant: a full disk leaves nothing behind") {
  const Workshop w({.layers = 1});
  // File sizes are limited in blocks of 512 bytes (of 1024 in some shells); the model takes more
  // than 160 KiB while it is written, most of it room for the header.
  for (const int blocks : {1, 64, 128}) {
    CAPTURE(blocks);
    w.check_refused(w.quick(), 1, "model.safetensors", fmt::format("ulimit -f {};", blocks));
  }
  const Outcome o = w.quant(w.quick(), "ulimit -f 4096;");
  CAPTURE(o.err);
  CHECK(o.code == 0);
}

TEST_CASE("omq-quant: the bundled model") {
  const fs::path tiny = source_path("tests/fixtures/tiny-llama");
  if (!fs::exists(tiny / "model.safetensors")) {
    MESSAGE("skipped: no tests/fixtures/tiny-llama");
    return;
  }
  const Workshop w;
  const std::string eval = fmt::format(
      "-m '{0}' -o {1} --force --wbits 2 --group-size 128 --eval-context 128 "
      "--eval-chunks 8 --eval ppl:'{0}/test.txt' ",
      tiny.string(), w.path("out"));
  const auto perplexity = [&](const std::string& more) {
    const Outcome o = w.quant(eval + more);
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    return w.report()["evaluation"][0]["perplexity"].get<double>();
  };
  const double nearest = perplexity("--method rtn");
  const double learned = perplexity(
      fmt::format("--epochs 8 --nsamples 16 --seqlen 64 --calib '{}/calib.txt'", tiny.string()));
  CHECK(learned < nearest);
}

}  // namespace omq
