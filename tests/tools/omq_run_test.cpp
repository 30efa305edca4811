// omq-run as its users meet it: exit codes, messages, and a stdout that holds the result and
// nothing else.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "tensor/error.h"
#include "tests/support/shared.h"

#ifndef OMQ_BIN_DIR
#define OMQ_BIN_DIR "build/bin"
#endif

namespace omq {
namespace {

using nlohmann::json;

struct Outcome {
  int code = -1;
  std::string out, err;
};

std::string slurp(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// `before` stands in front of the program in the shell: a variable, or a pipe that feeds it.
Outcome omq_run(const std::string& arguments, const std::string& before = "") {
  const auto err =
      std::filesystem::temp_directory_path() / fmt::format("omq-run-test-{}", getpid());
  const std::string command =
      fmt::format("{} '{}/omq-run' {} 2>'{}'{}", before, OMQ_BIN_DIR, arguments, err.string(),
                  before.empty() ? " </dev/null" : "");
  Outcome o;
  FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) o.out.append(buffer, n);
  const int status = pclose(pipe);
  o.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  o.err = slurp(err);
  std::filesystem::remove(err);
  return o;
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::string model() { return "-m '" + source_path("tests/fixtures/tiny-llama").string() + "'"; }
std::string test_text() {
  return "'" + source_path("tests/fixtures/tiny-llama/test.txt").string() + "'";
}
const std::string kStory = " -p 'Ella was a cheerful girl.' --temp 0 ";

TEST_CASE("omq-run: caches of other types say nearly the same") {
  const std::string run =
      "generate -q --temp 0 -n 12 -p 'Once upon a time' --device cpu --json " + model();
  const auto text = [&](const std::string& types) {
    const Outcome o = omq_run(run + types);
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    return json::parse(o.out)["text"].get<std::string>();
  };
  const std::string exact = text("");
  CHECK(text(" -ctk f16") == exact);
  CHECK(text(" -ctk f16 -ctv f16") == exact);
  CHECK(text(" -ctk int8 -ctv q8_0") == exact);
  CHECK(!text(" --cache-type-k int4 --cache-type-v int4").empty());
  const Outcome mixed = omq_run(run + " -ctk f16 -ctv f32");
  CHECK(mixed.code == 2);
  CHECK(has(mixed.err, "-ctk f16 -ctv f32: floats of one type only"));
}

TEST_CASE("help and version go to stdout with code 0") {
  CHECK(omq_run("--help").code == 0);
  CHECK(has(omq_run("--help").out, "omq-run generate"));
  CHECK(has(omq_run("generate --help").out, "--top-p"));
  CHECK(omq_run("ppl -h").code == 0);
  const Outcome version = omq_run("--version");
  CHECK(version.code == 0);
  CHECK(version.out.starts_with("omq-run "));
  CHECK(has(version.out, "packed kernels"));
  CHECK(version.err.empty());
}

TEST_CASE("wrong usage: code 2, the flag named, the nearest one suggested") {
  struct Case {
    const char *arguments, *message;
  };
  const Case cases[] = {
      {"", "Usage:"},
      {"genrate -m x", "unknown command \"genrate\", did you mean generate?"},
      {"generate -m x --tmep 0", "unknown option --tmep, did you mean --temp?"},
      {"generate -m x --topk 3", "unknown option --topk, did you mean --top-k?"},
      {"generate --tmep 0", "unknown option --tmep, did you mean --temp?"},
      {"generate -p hello", "required"},
      {"generate -m x -p a --temp hot", "--temp"},
      {"generate -m x -p a -f b", "excludes"},
      {"generate -m x -p a --device tpu", "--device tpu: cpu, cuda, cuda:N or auto wanted"},
      {"generate -m x -p a --device cpu --cuda-path sm70", "--cuda-path sm70: auto or sm80 wanted"},
      {"generate -m x -p a --device cuda:x", "--device cuda:x: a number after cuda: wanted"},
      {"generate -m x -p a -ctk q5_1", "cache type q5_1: f32, f16, int8 or int4"},
      {"bench -m x -ctv int3", "cache type int3: f32, f16, int8 or int4"},
      {"generate -m x -p a --isa z80", "--isa z80: this machine runs"},
      {"generate -m x -p a --parallel 0", "--parallel 0: 1 to 16"},
      {"generate -m x -p a -np 17", "--parallel 17: 1 to 16"},
      {"generate -m x -p a -np two", "--parallel"},
      {"bench -m x -np 1,32", "--parallel 32: 1 to 16"},
      {"bench -m x -np 0", "--parallel"},
      {"ppl -m x -f y --protocol wiki",
       "protocol \"wiki\" is not known; there are gptq, llama.cpp and documents"},
      {"ppl -m x -f y --skip 1", "--skip: protocol gptq knows no documents; add --protocol"},
      {"ppl -m x -f y --protocol llama.cpp --separator q", "--separator: protocol llama.cpp knows"},
      {"ppl -m '' -f y", "-m: the name of the model is empty"},
      {"ppl -m x -f ''", "-f: the name of the file is empty"},
      {"generate -m x -p a --top-p 2", "--top-p 2 is outside (0, 1]"},
      {"chat -m x --temp -1", "--temp -1 is outside"},
      {"bench -m x -p 5,a", "--n-prompt: \"5,a\" is not a list of whole numbers"},
      {"bench -m x -o xml", "--output xml: there are md, json, jsonl and csv"},
      {"bench -m x -p 0 -n 0", "nothing to measure"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.arguments);
    const Outcome o = omq_run(c.arguments);
    CAPTURE(o.err);
    CHECK(o.code == 2);
    CHECK(o.out.empty());
    CHECK(has(o.err, c.message));
  }
  // No machine has so many: one clear error in every build, before anything is read.
  for (const char* gpu : {" --device cuda:100", " --device cuda:127 -ngl 99"}) {
    const Outcome o = omq_run("generate -m nowhere -p a" + std::string(gpu));
    CHECK(o.code == 1);
    CHECK(has(o.err, "cuda:1"));
    CHECK(!has(o.err, "nowhere"));
  }
  const Outcome range = omq_run("generate " + model() + " -p a --top-p 2");
  CHECK(range.code == 2);
  CHECK(has(range.err, "omq-run: --top-p 2 is outside (0, 1]"));
}

TEST_CASE("failures: code 1, one line that says what") {
  const Outcome missing = omq_run("info -m /nowhere/model");
  CHECK(missing.code == 1);
  CHECK(missing.out.empty());
  CHECK(missing.err.starts_with("omq-run: "));
  CHECK(has(missing.err, "/nowhere/model"));
  const Outcome text = omq_run("ppl -q " + model() + " -f /nowhere/text");
  CHECK(text.code == 1);
  CHECK(has(text.err, "/nowhere/text"));
  const Outcome context = omq_run("generate " + model() + " -p a -c 100000");
  CHECK(context.code == 1);
  CHECK(has(context.err, "a context of 100000 tokens is wanted, the model was made for 256"));
  const Outcome window = omq_run("ppl " + model() + " -c 512 -f " + test_text());
  CHECK(window.code == 1);
  CHECK(has(window.err, "a context of 512 tokens is wanted, the model was made for 256"));
  const Outcome own = omq_run("ppl " + model() + " --chunks 1 -f " + test_text());
  CHECK(own.code == 0);
  CHECK(has(own.err, "windows of 256 tokens: the model's context"));
  const Outcome layers = omq_run("generate " + model() + " -p a -ngl some");
  CHECK(layers.code == 2);
  CHECK(has(layers.err, "--gpu-layers some: a number"));
  const Outcome form = omq_run("chat " + model() + " -p a --chat-template foo");
  CHECK(form.code == 2);
  CHECK(has(form.err, "--chat-template foo: chatml, llama2, llama3 or zephyr"));
}

TEST_CASE("generate: stdout is the text alone, by every way to give a prompt") {
  const Outcome o = omq_run("generate " + model() + kStory + "-n 20");
  CHECK(o.code == 0);
  CHECK(o.out.size() > 20);
  CHECK(has(o.err, "t/s"));
  CHECK(has(o.err, "GB/s"));
  CHECK(has(o.err, "ended by: token limit"));
  const std::string rest = " --temp 0 -n 20 -q";
  CHECK(omq_run("generate " + model() + kStory + "-n 20 -q").err.empty());
  CHECK(omq_run("generate --n_predict 20 --no_perf" + kStory + model().substr(3)).out ==
        o.out);  // positional, _ for -
  CHECK(omq_run("generate " + model() + rest, "printf 'Ella was a cheerful girl.\\n' |").out ==
        o.out);
  CHECK(omq_run("generate -f - " + model() + rest, "printf 'Ella was a cheerful girl.' |").out ==
        o.out);
  CHECK(omq_run("generate " + model() + kStory + "-n 20 --display-prompt").out ==
        "Ella was a cheerful girl." + o.out);
  CHECK(omq_run("generate " + model() + kStory + "-n 20 -t 2 -tb 1").out == o.out);
  CHECK(omq_run("generate " + model() + kStory + "-n 0").out.empty());
}

TEST_CASE("generate: seeds, stop strings, bias") {
  const std::string hot = "generate -q " + model() + " -p 'Ella was' --temp 1.5 -n 20 --seed ";
  CHECK(omq_run(hot + "5").out == omq_run(hot + "5").out);
  CHECK(omq_run(hot + "5").out != omq_run(hot + "6").out);
  const std::string whole = omq_run("generate -q " + model() + kStory + "-n 40").out;
  const size_t at = std::min(whole.find('.'), whole.find(" w"));
  REQUIRE(at != std::string::npos);
  CHECK(omq_run("generate -q " + model() + kStory + "-n 40 --stop . -r ' w'").out ==
        whole.substr(0, at));
  const json first = json::parse(omq_run("generate --json " + model() + kStory + "-n 1").out);
  const int id = first["tokens"][0].get<int>();
  const json other = json::parse(
      omq_run(fmt::format("generate --json {}{}-n 1 -l {}=-inf", model(), kStory, id)).out);
  CHECK(other["tokens"][0] != id);
  CHECK(omq_run("generate " + model() + kStory + "-l banana").code == 2);
}

TEST_CASE("generate: several continuations, each under its heading") {
  const std::string hot = "generate -q " + model() + " -p 'Ella was' --temp 1.5 -n 12 ";
  const auto text = [&](int seed) { return omq_run(hot + "-s " + std::to_string(seed)).out; };
  const Outcome three = omq_run(hot + "-s 7 -np 3");
  CHECK(three.code == 0);
  CHECK(three.err.empty());
  CHECK(three.out == "== 1 of 3, seed 7 ==\n" + text(7) + "\n\n== 2 of 3, seed 8 ==\n" + text(8) +
                         "\n\n== 3 of 3, seed 9 ==\n" + text(9) + "\n");
  CHECK(omq_run(hot + "-s 7 --parallel 1").out == text(7));
  const Outcome greedy = omq_run("generate " + model() + kStory + "-n 5 --parallel 2");
  CHECK(has(greedy.out, "== 2 of 2 ==\n"));
  CHECK(has(greedy.err, "generated      10 tokens"));
  const json j = json::parse(omq_run(hot + "-s 7 -np 2 --json").out);
  REQUIRE(j["continuations"].size() == 2);
  CHECK(j["generated_tokens"] == 24);
  CHECK(j["continuations"][1]["text"] == text(8));
  CHECK(j["continuations"][1]["seed"] == 8);
  const Outcome full =
      omq_run("generate --no-perf " + model() + kStory + "-c 16 -n 100 --ignore-eos -np 2");
  CHECK(full.code == 1);
  CHECK(has(full.err, "the context of 16 tokens is full"));
}

TEST_CASE("generate: a full context is said") {
  const Outcome o = omq_run("generate --no-perf " + model() + kStory + "-c 16 -n 100 --ignore-eos");
  CHECK(o.code == 1);
  CHECK_FALSE(o.out.empty());
  CHECK(has(o.err, "the context of 16 tokens is full"));
  CHECK(omq_run("generate " + model() + kStory + "-c 16 --ignore-eos").code == 0);
  const Outcome prompt = omq_run("generate " + model() + kStory + "-c 4");
  CHECK(prompt.code == 1);
  CHECK(prompt.out.empty());
  CHECK(has(prompt.err, "the context holds 4"));
}

TEST_CASE("--json gives one object") {
  const json g = json::parse(omq_run("generate --json " + model() + kStory + "-n 5").out);
  for (const char* key :
       {"text", "prompt_tokens", "generated_tokens", "generated_tokens_per_second",
        "time_to_first_token_seconds", "peak_memory_bytes", "finish_reason", "seed"})
    CHECK(g.contains(key));
  CHECK(g["generated_tokens"] == 5);

  const Outcome o = omq_run("ppl --json " + model() + " -c 128 --chunks 4 -f " + test_text());
  CHECK(o.code == 0);
  const json p = json::parse(o.out);
  CHECK(p["protocol"] == "gptq");
  CHECK(p["windows"] == 4);
  CHECK(p["context"] == 128);
  CHECK(p["predictions"] == 4 * 127);
  CHECK(p["perplexity"].get<double>() > 1.0);
  CHECK(p["file_sha256"].get<std::string>().size() == 64);
  CHECK(p["tokens"].get<int64_t>() > 4 * 128);
  CHECK(p.contains("model"));
  CHECK(p.contains("seconds"));

  const json i = json::parse(omq_run("info --json --sha256 " + model()).out);
  CHECK(i["config"]["vocab_size"] == 512);
  CHECK(i["bits_per_weight"] == doctest::Approx(16.0));
  CHECK(i["files"][0]["sha256"].get<std::string>().size() == 64);
}

TEST_CASE("ppl prints its method; the same on any number of threads") {
  const std::string arguments = "ppl " + model() + " -c 128 --chunks 6 -f " + test_text();
  const Outcome o = omq_run(arguments);
  for (const char* part : {"protocol    gptq: 6 windows", "of 128 tokens", "762 predictions",
                           "sha256 ", "perplexity  "})
    CHECK(has(o.out, part));
  CHECK(omq_run(arguments + " -t 2").out == o.out);
  CHECK(has(omq_run(arguments + " --protocol llama.cpp").out, "llama.cpp: 6 windows"));
  CHECK(has(omq_run("ppl " + model() + " --protocol documents --separator '' --chunks 3 -f " +
                    test_text())
                .out,
            "documents: 3 documents"));
}

TEST_CASE("bench: llama-bench's fields, lists multiplied out") {
  const Outcome o = omq_run("bench -q " + model() + " -p 8,16 -n 4 -t 1,2 -r 2 -o json");
  CHECK(o.code == 0);
  CHECK(o.err.empty());
  const json rows = json::parse(o.out);
  REQUIRE(rows.size() == 6);
  for (const json& r : rows) {
    for (const char* key :
         {"model_filename", "model_type", "model_size", "model_n_params", "n_prompt", "n_gen",
          "n_threads", "avg_ts", "stddev_ts", "avg_ns", "samples_ts"})
      CHECK(r.contains(key));
    CHECK(r["avg_ts"].get<double>() > 0);
    CHECK(r["samples_ts"].size() == 2);
    CHECK((r["n_gen"] == 4) == r.contains("bandwidth_share"));
  }
  CHECK(rows[0]["n_prompt"] == 8);
  CHECK(rows[3]["n_threads"] == 2);
  const Outcome md = omq_run("bench -q " + model() + " -p 0 -n 4 -r 1 --no-bandwidth");
  CHECK(has(md.out, "tg4"));
  CHECK_FALSE(has(md.out, "pp"));
  const json batches = json::parse(
      omq_run("bench -q " + model() + " -p 0 -n 4 -r 1 -np 1,3 --no-bandwidth -o json").out);
  REQUIRE(batches.size() == 2);
  CHECK(batches[1]["n_parallel"] == 3);
  CHECK(batches[1]["avg_ts"].get<double>() * batches[1]["avg_ns"].get<double>() ==
        doctest::Approx(12e9));
  CHECK(has(omq_run("bench -q " + model() + " -p 0 -n 4 -r 1 -np 3 --no-bandwidth").out, "tg4x3"));
  const Outcome csv = omq_run("bench -q " + model() + " -p 4 -n 0 -r 1 -o csv");
  CHECK(csv.out.starts_with("build_version,"));
}

TEST_CASE("chat: answers on stdout, commands, and a model without a template") {
  const Outcome none = omq_run("chat " + model(), "echo hello |");
  CHECK(none.code == 1);
  CHECK(none.out.empty());
  CHECK(has(none.err, "--chat-template"));
  const std::string chat = "chat --temp 0 -n 8 --no-perf -q --chat-template chatml " + model();
  const Outcome one = omq_run(chat, "echo hello |");
  CAPTURE(one.err);
  CHECK(one.code == 0);
  CHECK(one.out.ends_with("\n"));
  CHECK(one.err.empty());
  const Outcome two = omq_run(chat, "printf 'hello\\n/reset\\nhello\\n/help\\n/exit\\nhello\\n' |");
  CHECK(two.out == one.out + one.out);
  CHECK(has(two.err, "/save FILE"));
  const Outcome unknown = omq_run(chat, "echo /dance |");
  CHECK(unknown.out.empty());
  CHECK(has(unknown.err, "unknown command /dance"));

  const auto file =
      std::filesystem::temp_directory_path() / fmt::format("omq-run-chat-{}.json", getpid());
  omq_run(chat + " -sys 'Be brief.'", fmt::format("printf 'hello\\n/save {}\\n' |", file.string()));
  const json saved = json::parse(slurp(file));
  std::filesystem::remove(file);
  REQUIRE(saved.size() == 3);
  CHECK(saved[0]["content"] == "Be brief.");
  CHECK(saved[1]["role"] == "user");
  CHECK(saved[2]["role"] == "assistant");
}

}  // namespace
}  // namespace omq
