// omq-run generate: continue a text.
#include "tools/run_common.h"

namespace omq::run {
namespace {

struct Options {
  ModelOptions model;
  SamplingOptions sampling;
  std::string prompt, file;
  bool json = false, no_perf = false, show_prompt = false, escapes = false, have_prompt = false;
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
  app.add_flag("--display-prompt,!--no-display-prompt", o.show_prompt,
               "print the prompt before the answer");
  add_sampling_options(app, o.sampling);
  app.add_flag("--json", o.json, "one JSON object with text and figures instead of text");
  app.add_flag("--no-perf", o.no_perf, "no figures at the end");
  if (!cli::parse(app, args, kAliases)) return false;
  o.have_prompt = prompt->count() > 0;
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

}  // namespace

int generate(const cli::Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  apply(o.model);
  const std::string prompt = prompt_of(o);
  const OpenModel m = open_model(o.model, o.model.context);
  GenerateOptions options = generate_options(o.sampling, m.model->config().vocab_size);
  const std::vector<int32_t> ids = encode(*m.tokenizer, prompt, o.model.quiet);
  Interrupt interrupt;
  options.cancel = interrupt.flag();
  auto show = [](std::string_view text) {
    fmt::print("{}", text);
    check(std::fflush(stdout) == 0, "cannot write to standard output");
  };
  if (!o.json) {
    options.on_text = show;
    if (o.show_prompt) show(prompt);
  }
  Generator generator(*m.model, *m.tokenizer);
  const GenerateResult result = generator.generate(ids, options);
  if (o.json) {
    nlohmann::json j = stats_json(result, m, options.sampling.seed);
    j["text"] = result.text;
    j["tokens"] = result.tokens;
    j["model"] = o.model.model;
    fmt::print("{}\n", j.dump(2));
  } else {
    // A shell's prompt should not follow the last word; a file or pipe gets the text alone.
    if (cli::is_terminal(stdout) && !result.text.ends_with('\n')) show("\n");
    if (!o.no_perf && !o.model.quiet) print_stats(result, m, options.sampling.seed);
  }
  if (result.finish == FinishReason::ContextFull) {
    fmt::print(stderr,
               "omq-run: the context of {} tokens is full: {} of the prompt, {} made; raise -c\n",
               generator.context(), result.stats.prompt_tokens, result.stats.generated_tokens);
    return o.sampling.max_tokens < 0 ? 0 : 1;
  }
  return result.finish == FinishReason::Cancelled ? 130 : 0;
}

}  // namespace omq::run
