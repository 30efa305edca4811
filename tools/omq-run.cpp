// omq-run: generate, converse, measure, inspect. Picks the subcommand; each one is
// tools/run_NAME.cpp.
#include "tools/run_common.h"

namespace {

using omq::cli::Args;

struct Command {
  const char* name;
  int (*run)(const Args&);
  const char* what;
};
constexpr Command kCommands[] = {
    {"generate", omq::run::generate, "continue a text"},
    {"chat", omq::run::chat, "converse, by the model's own prompt format"},
    {"ppl", omq::run::ppl, "perplexity of a text file"},
    {"bench", omq::run::bench, "tokens per second, GB/s, share of the read bandwidth"},
    {"info", omq::run::info, "what is inside a model"},
};

std::string help() {
  std::string text =
      "omq-run runs packed low-bit models and the checkpoints that they are made from.\n\nUsage:\n";
  for (const Command& c : kCommands)
    text += fmt::format("  omq-run {:9} -m MODEL [options]   {}\n", c.name, c.what);
  return text +
         "\nMODEL is a Hugging Face folder, a GGUF file, or the output of omq-quant.\n"
         "omq-run COMMAND --help lists the options of a command; omq-run --version says what this "
         "build is.\n";
}

int run(const Args& args) {
  if (args.empty()) {
    fmt::print(stderr, "{}", help());
    return 2;
  }
  const std::string& name = args.front();
  if (name == "-h" || name == "--help" || name == "help") {
    fmt::print("{}", help());
    return 0;
  }
  if (name == "--version") {
    fmt::print("{}", omq::cli::version_text("omq-run"));
    return 0;
  }
  std::vector<std::string> names;
  for (const Command& c : kCommands) {
    if (name == c.name) return c.run(Args(args.begin() + 1, args.end()));
    names.emplace_back(c.name);
  }
  const auto guess = omq::cli::nearest(name, names);
  throw omq::cli::UsageError(fmt::format("unknown command \"{}\"{}; omq-run --help lists all", name,
                                         guess ? fmt::format(", did you mean {}?", *guess) : ""));
}

}  // namespace

int main(int argc, char** argv) { return omq::cli::run_program("omq-run", argc, argv, run); }
