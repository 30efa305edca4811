// The manners of our programs; see cli.h.
#include "tools/cli.h"

#include <sys/ioctl.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>

#include "tensor/cpu/gemm.h"
#include "tensor/device.h"
#include "tensor/isa.h"
#include "tools/interrupt.h"

namespace omq::cli {
namespace {

// '-' and '_' are one letter in option names; an "=value" is not part of the name.
std::string canonical(std::string_view option) {
  std::string name(option.substr(0, option.find('=')));
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    for (const std::string& name : option->get_snames()) names.push_back("-" + name);
  }
  return names;
}

// Args in the spelling that CLI11 was told.
Args spelled_as_declared(const CLI::App& app, const Args& args, const Aliases& aliases) {
  const std::vector<std::string> names = option_names(app);
  Args out;
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i] == "--") {
      out.insert(out.end(), args.begin() + static_cast<int64_t>(i), args.end());
      break;
    }
    std::string arg = args[i];
    for (const auto& [alias, name] : aliases)
      if (arg == alias) arg = name;
    if (arg.starts_with("--")) {
      const std::string name = canonical(arg);
      for (const std::string& declared : names)
        if (canonical(declared) == name) {
          arg.replace(0, name.size(), declared);
          break;
        }
    }
    out.push_back(std::move(arg));
  }
  return out;
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

[[noreturn]] void unknown_argument(const CLI::App& app, const std::vector<std::string>& left,
                                   const Aliases& aliases) {
  const auto option = std::find_if(left.begin(), left.end(),
                                   [](const std::string& s) { return s.starts_with("-"); });
  if (option == left.end())
    throw UsageError(fmt::format("unexpected argument \"{}\"; {} --help lists what there is",
                                 left.front(), app.get_name()));
  std::vector<std::string> names = option_names(app);
  for (const auto& [alias, name] : aliases) names.push_back(alias);
  const std::string name = option->substr(0, option->find('='));
  const std::optional<std::string> guess = nearest(name, names);
  throw UsageError(fmt::format("unknown option {}{}; {} --help lists all", name,
                               guess ? fmt::format(", did you mean {}?", *guess) : "",
                               app.get_name()));
}

// What follows `key` on the first line of a file of /proc that begins with it.
std::optional<std::string> proc_entry(const char* file, std::string_view key) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> in(std::fopen(file, "r"), &std::fclose);
  while (in) {
    const std::optional<std::string> line = read_line(in.get());
    if (!line) break;
    if (line->starts_with(key)) return line->substr(key.size());
  }
  return std::nullopt;
}

uint64_t proc_kilobytes(const char* file, std::string_view key) {
  const std::optional<std::string> entry = proc_entry(file, key);
  return entry ? std::strtoull(entry->c_str(), nullptr, 10) * 1024 : 0;
}

}  // namespace

int run_program(std::string_view program, int argc, char** argv,
                const std::function<int(Args)>& body) {
  std::signal(SIGPIPE, SIG_DFL);
  std::signal(SIGXFSZ,
              SIG_IGN);  // a file that grows too large is an error of write(), with a message
  try {
    const int code = body(Args(argv + std::min(argc, 1), argv + argc));
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
      fail("cannot write to standard output");
    return code;
  } catch (const UsageError& e) {
    fmt::print(stderr, "{}: {}\n", program, e.what());
    return 2;
  } catch (const Interrupted& e) {
    fmt::print(stderr, "{}: interrupted\n", program);
    return e.exit_code();
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "{}: out of memory (peak so far {})\n", program,
               human_bytes(static_cast<double>(peak_memory_bytes())));
  } catch (const std::exception& e) {
    fmt::print(stderr, "{}: {}\n", program, e.what());
  }
  return 1;
}

bool parse(CLI::App& app, const Args& args, const Aliases& aliases) {
  Args reversed = spelled_as_declared(app, args, aliases);
  std::reverse(reversed.begin(), reversed.end());  // CLI11 takes a vector from its end
  try {
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    fmt::print("{}", app.help());
    return false;
  } catch (const CLI::ExtrasError&) {
    unknown_argument(app, app.remaining(true), aliases);
  } catch (const CLI::ParseError& e) {
    // A misspelt option can leave its value where a required argument was looked for; name the
    // cause first.
    for (const std::string& left : app.remaining(true))
      if (left.starts_with("-")) unknown_argument(app, {left}, aliases);
    throw UsageError(fmt::format("{}; {} --help says more", e.what(), app.get_name()));
  }
  return true;
}

std::optional<std::string> nearest(std::string_view word, std::span<const std::string> candidates) {
  auto bare = [](std::string_view s) {
    const std::string name = canonical(s);
    return name.substr(std::min(name.find_first_not_of('-'), name.size()));
  };
  const std::string wanted = bare(word);
  std::optional<std::string> best;
  size_t least = wanted.size() / 3 + 2;  // further off than that is another word
  for (const std::string& candidate : candidates) {
    const std::string name = bare(candidate);
    if (name.size() < 2 || wanted.size() < 2) continue;
    size_t distance = edit_distance(wanted, name);
    if (name.starts_with(wanted)) distance = std::min<size_t>(distance, 1);  // cut short
    if (distance < least) {
      least = distance;
      best = candidate;
    }
  }
  return best;
}

std::vector<int64_t> parse_int_list(std::string_view text, std::string_view option,
                                    int64_t lowest) {
  std::vector<int64_t> values;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    int64_t value = 0;
    const auto [stop, error] = std::from_chars(text.data() + at, text.data() + end, value);
    if (error != std::errc{} || stop != text.data() + end || value < lowest)
      throw UsageError(
          fmt::format("{}: \"{}\" is not a list of whole numbers from {} on, such as 1,2", option,
                      text, lowest));
    values.push_back(value);
    at = end + 1;
  }
  return values;
}

std::optional<Decimal> decimal_at(std::string_view text) {
  const std::string digits(text.substr(0, text.find_first_of("xX")));  // nothing hexadecimal
  if (digits.empty() || std::string_view("0123456789.-in").find(digits[0]) == std::string::npos)
    return std::nullopt;
  char* end = nullptr;
  const double value = std::strtod(digits.c_str(), &end);
  const bool named = digits.find_first_of("in") <= 1;  // inf, nan
  if (end == digits.c_str() || (!named && !std::isfinite(value))) return std::nullopt;
  return Decimal{value, static_cast<size_t>(end - digits.c_str())};
}

std::optional<std::string> read_line(std::FILE* stream) {
  std::string line;
  int c = std::getc(stream);
  if (c == EOF) return std::nullopt;
  for (; c != EOF && c != '\n'; c = std::getc(stream)) line += static_cast<char>(c);
  return line;
}

bool is_terminal(std::FILE* stream) { return isatty(fileno(stream)) != 0; }

std::string human_bytes(double bytes) {
  if (bytes < 1024) return fmt::format("{:.0f} B", bytes);
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  bytes /= 1024;
  while (bytes >= 1024 && unit + 1 < std::size(kUnits)) {
    bytes /= 1024;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", bytes, bytes < 10 ? 2 : bytes < 100 ? 1 : 0, kUnits[unit]);
}

std::string human_seconds(double seconds) {
  if (seconds < 60) return fmt::format("{:.1f} s", seconds);
  const auto whole = static_cast<int64_t>(seconds + 0.5);
  const int64_t hours = whole / 3600, minutes = whole / 60 % 60;
  if (hours > 0) return fmt::format("{}:{:02}:{:02}", hours, minutes, whole % 60);
  return fmt::format("{}:{:02}", minutes, whole % 60);
}

uint64_t peak_memory_bytes() { return proc_kilobytes("/proc/self/status", "VmHWM:"); }
uint64_t available_memory_bytes() { return proc_kilobytes("/proc/meminfo", "MemAvailable:"); }

std::string cpu_name() {
  const std::optional<std::string> entry = proc_entry("/proc/cpuinfo", "model name");
  const size_t at = entry ? entry->find(": ") : std::string::npos;
  return at == std::string::npos ? "unknown CPU" : entry->substr(at + 2);
}

std::string version_text(std::string_view program) {
  return fmt::format("{} {} ({}, packed kernels {}, matrix products {}, CUDA {})\n", program,
                     OMQ_VERSION,
#if defined(__clang__)
                     "clang " __clang_version__,
#else
                     "g++ " __VERSION__,
#endif
                     packed_isa_name(), cpu::gemm_name(), cuda_device_api() ? "yes" : "no");
}

// ---- Progress ----

Progress::Progress(std::string stage, int64_t total, bool quiet)
    : stage_(std::move(stage)),
      total_(total),
      quiet_(quiet),
      terminal_(is_terminal(stderr)),
      start_(std::chrono::steady_clock::now()),
      shown_(start_) {}

Progress::~Progress() { erase(); }

double Progress::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Progress::erase() {
  if (drawn_) fmt::print(stderr, "\r\x1b[K");
  drawn_ = false;
}

void Progress::update(int64_t done, std::string_view note) {
  check_interrupted();
  if (quiet_) return;
  const auto now = std::chrono::steady_clock::now();
  const double since = std::chrono::duration<double>(now - shown_).count();
  if (since < (terminal_ ? 0.1 : 30.0) || (!terminal_ && done == total_)) return;
  shown_ = now;
  std::string line = fmt::format("{} {}", stage_, done);
  if (total_ > 0) {
    line += fmt::format("/{} ({}%)", total_, 100 * done / total_);
    if (done > 0)
      line += fmt::format("  ETA {}", human_seconds(seconds() * static_cast<double>(total_ - done) /
                                                    static_cast<double>(done)));
  }
  if (!note.empty()) line += fmt::format("  {}", note);
  if (terminal_) {
    winsize window{};
    const size_t width = ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 1
                             ? window.ws_col - 1u
                             : 79u;
    fmt::print(stderr, "\r\x1b[K{}", std::string_view(line).substr(0, width));
    std::fflush(stderr);
    drawn_ = true;
  } else {
    fmt::print(stderr, "{}\n", line);
  }
}

void Progress::finish(std::string_view line) {
  if (quiet_) return;
  erase();
  fmt::print(stderr, "{}\n", line);
}

}  // namespace omq::cli
