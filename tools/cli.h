// Manners that all our programs share: how they read options, fail, show progress, and write
// numbers.
//
// Results go to stdout and nothing else does; everything said about the work goes to stderr. Exit
// codes: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n. Option names may be written
// with '-' or '_' inside.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tensor/error.h"

namespace CLI {
class App;
}

namespace omq::cli {

// Arguments without the program's name.
using Args = std::vector<std::string>;

// The user asked for something that does not exist: exit code 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

// Runs body and returns its exit code; an exception becomes one line "PROGRAM: message" on stderr
// and code 1 or 2. A reader that closes our stdout (| head) ends the program quietly.
int run_program(std::string_view program, int argc, char** argv,
                const std::function<int(Args)>& body);

// Options of one dash and several letters, which CLI11 does not know: {"-ngl", "--gpu-layers"}.
using Aliases = std::vector<std::pair<std::string, std::string>>;

// Parses args into the variables that app's options are bound to. False when help was printed
// instead. Throws UsageError that names the option, and for an unknown one the nearest that there
// is.
bool parse(CLI::App& app, const Args& args, const Aliases& aliases = {});

// Of `candidates` the one that `word` most probably meant; none when all are far off. Dashes at the
// front and the difference between '-' and '_' do not count.
std::optional<std::string> nearest(std::string_view word, std::span<const std::string> candidates);

// Parts of a list "1,2,4". Throws UsageError naming `option` on anything but whole numbers ≥
// lowest.
std::vector<int64_t> parse_int_list(std::string_view text, std::string_view option, int64_t lowest);

// The decimal number at the front of text, and how many characters it takes; nothing when there is
// none. (std::from_chars does it too, and is 40 KB of a static program.)
struct Decimal {
  double value;
  size_t length;
};
std::optional<Decimal> decimal_at(std::string_view text);

// The next line without its end, nothing at the end of the stream.
std::optional<std::string> read_line(std::FILE* stream);
bool is_terminal(std::FILE* stream);
// "1.50 GiB", "12.3 MiB", "640 B".
std::string human_bytes(double bytes);
// "12.3 s", "4:02", "1:02:03".
std::string human_seconds(double seconds);

// Highest resident memory of this process so far, and memory that can still be had; bytes, 0 when
// unknown.
uint64_t peak_memory_bytes();
uint64_t available_memory_bytes();
// "Intel(R) Xeon(R) …" or "unknown CPU".
std::string cpu_name();

// "omq-run 0.1.0 (…)": compiler, instruction set of the packed kernels, matrix products, CUDA.
std::string version_text(std::string_view program);

// One stage of work. On a terminal a line that is redrawn with percentage and remaining time; in a
// pipe one line at the end, and a sign of life every half minute.
class Progress {
 public:
  // total: units of work, 0 when unknown. quiet: says nothing at all.
  Progress(std::string stage, int64_t total, bool quiet = false);
  ~Progress();  // takes an unfinished line off the terminal
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // note: what has been found so far ("ppl 21.63"). Throws Interrupted (interrupt.h) after a
  // signal.
  void update(int64_t done, std::string_view note = {});
  // Replaces the line for good.
  void finish(std::string_view line);
  double seconds() const;

 private:
  void erase();

  std::string stage_;
  int64_t total_;
  bool quiet_, terminal_, drawn_ = false;
  std::chrono::steady_clock::time_point start_, shown_;
};

}  // namespace omq::cli
