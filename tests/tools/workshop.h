// A program as its users meet it, for the tests of tools/: run it, read what it says, and a folder
// with a tiny random model and texts to run it on.
#pragma once

#include <doctest/doctest.h>
#include <sys/wait.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/models/files.h"
#include "tests/support/random_model.h"

#ifndef OMQ_BIN_DIR
#define OMQ_BIN_DIR "build/bin"
#endif

namespace omq {

struct Outcome {
  int code = -1;
  std::string out, err;
};

// `before` stands in front of the program in the shell: a variable, or a limit.
inline Outcome run_program(const std::string& program, const std::string& arguments,
                           const std::string& before = "") {
  TempDir dir;
  const std::string command = fmt::format("{} '{}/{}' {} 2>'{}' </dev/null", before, OMQ_BIN_DIR,
                                          program, arguments, (dir / "err").string());
  Outcome o;
  FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) o.out.append(buffer, n);
  const int status = pclose(pipe);
  o.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  o.err = read_file(dir / "err");
  return o;
}

// A folder with a model, a calibration text and a test text; outputs go to `out` beside them.
struct Workshop {
  TempDir dir;

  explicit Workshop(const RandomModel& model = {.seed = 3}) {
    write_random_model(dir / "model", model);
    Rng rng(9);
    std::string text;
    for (int i = 0; i < 4000; ++i)
      text += i % 60 == 59 ? '\n' : static_cast<char>(rng.between(32, 126));
    write_file(dir / "calib.txt", text.substr(0, 2500));
    write_file(dir / "test.txt", text.substr(2500));
  }
  std::string path(std::string_view name) const { return "'" + (dir / name).string() + "'"; }
  // Model, output and a little text named.
  std::string with_text(const std::string& more = "") const {
    return fmt::format(
        "-m {} -o {} --calib {} --nsamples 3 --seqlen 24 --wbits 3 --group-size 32 {}",
        path("model"), path("out"), path("calib.txt"), more);
  }
  // For methods that learn: a calibration that takes no time.
  std::string quick(const std::string& more = "") const { return with_text("--epochs 2 " + more); }
  Outcome quant(const std::string& arguments, const std::string& before = "") const {
    return run_program("omq-quant", arguments, before);
  }
  nlohmann::json report() const {
    return nlohmann::json::parse(read_file(dir / "out/report.json"));
  }

  // It failed with this code and message, said nothing on stdout, and left nothing behind.
  void check_refused(const std::string& arguments, int code, std::string_view message,
                     const std::string& before = "") const {
    CAPTURE(arguments);
    const size_t entries = dir.entries();
    const Outcome o = quant(arguments, before);
    CAPTURE(o.err);
    CHECK(o.code == code);
    CHECK(o.out.empty());
    CHECK(contains(o.err, "omq-quant: "));
    CHECK(contains(o.err, message));
    CHECK(dir.entries() == entries);
  }
};

}  // namespace omq
