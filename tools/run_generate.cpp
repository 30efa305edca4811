// omq-run generate: continue a text, once or several times together.
#include <CLI/CLI.hpp>
#include <algorithm>

#include "models/json_file.h"
#include "tools/run_common.h"

namespace omq::run {
namespace {

struct Options {
  ModelOptions model;
  SamplingOptions sampling;
  std::string prompt, file;
  int64_t parallel = 1;
  bool json = false, no_perf = false, show_prompt = false, hide_prompt = false, escapes = false,
       have_prompt = false;
};

bool parse(const cli::Args& args, Options& o) {
  CLI::App app("Continues a text. The text goes to stdout, everything else to stderr.",
               "omq-run generate");
  add_model_options(app, o.model);
  auto* prompt = app.add_option("-p,--prompt", o.prompt, "text to continue")->type_name("TEXT");
  app.add_option("-f,--file", o.file,
                 "text to continue, from a file; - is standard input, as is a pipe")
      ->type_name("FILE")
      ->excludes(prompt);
  app.add_flag("-e,--escape", o.escapes, "\\n, \\t and \\\\ in the prompt mean what they do in C");
  auto* show =
      app.add_flag("--display-prompt", o.show_prompt, "print the prompt before the answer");
  app.add_flag("--no-display-prompt", o.hide_prompt, "do not (the default)")->excludes(show);
  add_sampling_options(app, o.sampling);
  app.add_option("--parallel", o.parallel,
                 "-np: so many continuations, made together, of seeds S, S + 1, …; each is printed "
                 "under a heading when all are done (default 1, at most 16)")
      ->type_name("N");
  app.add_flag("--json", o.json, "one JSON object with text and figures instead of text");
  app.add_flag("--no-perf", o.no_perf, "no figures at the end");
  if (!cli::parse(app, args, kAliases)) return false;
  o.have_prompt = prompt->count() > 0;
  if (o.parallel < 1 || o.parallel > DecodePlan::kMaxBatch)
    throw cli::UsageError(fmt::format("--parallel {}: 1 to {}", o.parallel, DecodePlan::kMaxBatch));
  if (o.parallel > 1) o.model.caches = o.parallel + 1;  // and the prompt's
  return true;
}

std::string unescaped(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const char next = text[i] == '\\' && i + 1 < text.size() ? text[i + 1] : '\0';
    if (next == 'n' || next == 't' || next == '\\') {
      out += next == 'n' ? '\n' : next == 't' ? '\t' : '\\';
      ++i;
    } else {
      out += text[i];
    }
  }
  return out;
}

std::string prompt_of(const Options& o) {
  if (o.have_prompt) return o.escapes ? unescaped(o.prompt) : o.prompt;
  if (o.file.empty() && cli::is_terminal(stdin))
    throw cli::UsageError(
        "nothing to continue: give -p TEXT, -f FILE or a pipe; omq-run chat converses");
  std::string text = read_input(o.file.empty() ? "-" : o.file);
  // Editors and echo end a text with a newline that nobody means.
  if (text.ends_with('\n')) text.pop_back();
  return o.escapes ? unescaped(text) : text;
}

std::vector<int32_t> encode(const Tokenizer& tokenizer, const std::string& prompt, bool quiet) {
  std::vector<int32_t> ids = tokenizer.encode(prompt);
  const auto bos = tokenizer.bos_id();
  if (!quiet && bos && ids.size() > 1 && ids[0] == *bos && ids[1] == *bos)
    fmt::print(
        stderr,
        "warning: the prompt begins with {}, and the tokenizer adds one: there are two now\n",
        tokenizer.token_piece(*bos));
  if (ids.empty() && bos) ids.push_back(*bos);
  check(!ids.empty(), "the prompt is empty, and the model has no token to begin a text with");
  return ids;
}

void show(std::string_view text) {
  fmt::print("{}", text);
  check(std::fflush(stdout) == 0, "cannot write to standard output");
}

void show_one(const Options& o, const OpenModel& m, const GenerateResult& result, uint64_t seed) {
  if (o.json) {
    nlohmann::json j = stats_json(result, m, seed);
    j["text"] = result.text;
    j["tokens"] = result.tokens;
    j["model"] = o.model.model;
    return fmt::print("{}\n", json_text(j, 2));
  }
  // A shell's prompt should not follow the last word; a file or pipe gets the text alone.
  if (cli::is_terminal(stdout) && !result.text.ends_with('\n')) show("\n");
  if (!o.no_perf && !o.model.quiet) print_stats(result, m, seed);
}

// seed: of the first; greedy ones have none that matters.
void show_all(const Options& o, const OpenModel& m, const std::string& prompt,
              const std::vector<GenerateResult>& results, uint64_t seed) {
  if (o.json) {
    nlohmann::json j = stats_json(results, m, seed), texts = nlohmann::json::array();
    for (size_t i = 0; i < results.size(); ++i)
      texts.push_back({{"text", results[i].text},
                       {"tokens", results[i].tokens},
                       {"finish_reason", to_string(results[i].finish)},
                       {"seed", seed + i}});
    j["continuations"] = texts;
    j["model"] = o.model.model;
    return fmt::print("{}\n", json_text(j, 2));
  }
  for (size_t i = 0; i < results.size(); ++i) {
    const std::string of_seed =
        o.sampling.sampler.temperature > 0 ? fmt::format(", seed {}", seed + i) : "";
    const std::string& text = results[i].text;
    show(fmt::format("{}== {} of {}{} ==\n{}{}{}", i > 0 ? "\n" : "", i + 1, results.size(),
                     of_seed, o.show_prompt ? prompt : "", text, text.ends_with('\n') ? "" : "\n"));
  }
  if (!o.no_perf && !o.model.quiet) print_stats(results, m, seed);
}

int exit_code(const Options& o, const Generator& generator, const GenerateResult& result) {
  if (result.finish == FinishReason::ContextFull) {
    fmt::print(stderr,
               "omq-run: the context of {} tokens is full: {} of the prompt, {} made; raise -c\n",
               generator.context(), result.stats.prompt_tokens, result.stats.generated_tokens);
    return o.sampling.max_tokens < 0 ? 0 : 1;
  }
  return result.finish == FinishReason::Cancelled ? 130 : 0;
}

}  // namespace

int generate(const cli::Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  apply(o.model);
  check_sampling(o.sampling);
  const std::string prompt = prompt_of(o);
  const OpenModel m = open_model(o.model, o.model.context);
  GenerateOptions options = generate_options(o.sampling, m.model->config().vocab_size);
  const uint64_t seed = options.sampling.seed;
  const std::vector<int32_t> ids = encode(*m.tokenizer, prompt, o.model.quiet);
  Interrupt interrupt;
  options.cancel = interrupt.flag();
  Generator generator(*m.model, *m.tokenizer);
  if (o.parallel > 1) {
    const auto results = generator.generate_parallel(ids, o.parallel, options);
    show_all(o, m, prompt, results, seed);
    // What is worth a word of one is so of all: they are equally long.
    const auto stopped = std::find_if(results.begin(), results.end(), [](const auto& r) {
      return r.finish == FinishReason::ContextFull || r.finish == FinishReason::Cancelled;
    });
    return stopped == results.end() ? 0 : exit_code(o, generator, *stopped);
  }
  if (!o.json) {
    options.on_text = show;
    if (o.show_prompt) show(prompt);
  }
  const GenerateResult result = generator.generate(ids, options);
  show_one(o, m, result, seed);
  return exit_code(o, generator, result);
}

}  // namespace omq::run
