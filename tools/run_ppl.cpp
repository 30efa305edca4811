// omq-run ppl: perplexity of a text, with the method that was used.
#include <CLI/CLI.hpp>
#include <chrono>

#include "models/evaluate.h"
#include "models/hash.h"
#include "models/json_file.h"
#include "tensor/isa.h"
#include "tensor/parallel.h"
#include "tools/run_common.h"

namespace omq::run {
namespace {

struct Options {
  ModelOptions model;
  std::string file, protocol = "gptq";
  PerplexityOptions perplexity;
  bool json = false, context_given = false;
};

bool parse(const cli::Args& args, Options& o) {
  CLI::App app("Perplexity of a text file.", "omq-run ppl");
  add_model_options(app, o.model, /*with_context=*/false);
  PerplexityOptions& p = o.perplexity;
  app.add_option("-f,--file", o.file, "text; - is standard input")->required()->type_name("FILE");
  auto* context = app.add_option("-c,--ctx-size", p.context, "tokens of a window (default 2048)")
                      ->type_name("N");
  app.add_option("--protocol", o.protocol,
                 "gptq (default): rows joined by blank lines, all predictions of a window count; "
                 "llama.cpp: the text "
                 "as it is, those of a window's second half; documents: texts apart, each after "
                 "BOS, the first "
                 "-c tokens of each")
      ->type_name("NAME");
  app.add_option("--chunks,--windows", p.max_windows,
                 "only the first N windows or documents (default: all)")
      ->type_name("N");
  const CLI::Option* const of_documents[] = {
      app.add_option("--separator", p.separator,
                     "documents: the line between texts (default <|endoftext|>)"),
      app.add_option("--skip", p.skip, "documents: leave out the first N")->type_name("N")};
  app.add_flag("--json", o.json, "one JSON object on stdout");
  if (!cli::parse(app, args, kAliases)) return false;
  try {
    p.protocol = protocol_from(o.protocol);
  } catch (const Error& e) {
    throw cli::UsageError(fmt::format("--protocol: {}", e.what()));
  }
  if (o.file.empty()) throw cli::UsageError("-f: the name of the file is empty");
  for (const CLI::Option* option : of_documents)
    if (option->count() > 0 && p.protocol != Protocol::Documents)
      throw cli::UsageError(
          fmt::format("{}: protocol {} knows no documents; add --protocol documents",
                      option->get_name(), to_string(p.protocol)));
  o.context_given = context->count() > 0;
  if (!o.context_given && p.protocol == Protocol::LlamaCpp)
    p.context = 512;  // llama.cpp's own default
  if (!o.context_given && p.protocol == Protocol::Documents) p.context = 0;  // the model's
  if (p.max_windows < 0 || p.skip < 0 || (context->count() > 0 && p.context < 2))
    throw cli::UsageError("--chunks and --skip are 0 or more, -c at least 2");
  return true;
}

std::string bos_text(const PerplexityResult& r) {
  if (!r.bos) return "no BOS";
  return r.protocol == Protocol::Gptq       ? "BOS before the text"
         : r.protocol == Protocol::LlamaCpp ? "BOS for the first token of each window"
                                            : "BOS before each document";
}

void print_method(const Options& o, const PerplexityResult& r, const std::string& hash) {
  const bool documents = r.protocol == Protocol::Documents;
  fmt::print("protocol    {}: {} {} of {}{}, {} predictions, {}\n", to_string(r.protocol),
             r.windows, documents ? "documents" : "windows", r.available,
             documents ? fmt::format(" ({} cut at {} tokens)", r.cut, r.context)
                       : fmt::format(" of {} tokens", r.context),
             r.predicted, bos_text(r));
  fmt::print("text        {}, {} tokens, sha256 {}\n", o.file, r.tokens, hash);
  fmt::print("mean loss   {:.6f} nats a token\n", r.mean_nll);
  fmt::print("perplexity  {:.6f}\n", r.perplexity);
}

void print_json(const Options& o, const PerplexityResult& r, const std::string& hash,
                const OpenModel& m, double seconds) {
  const nlohmann::json j = {{"perplexity", r.perplexity},
                            {"mean_nll", r.mean_nll},
                            {"tokens", r.tokens},
                            {"windows", r.windows},
                            {"windows_available", r.available},
                            {"predictions", r.predicted},
                            {"protocol", to_string(r.protocol)},
                            {"context", r.context},
                            {"cut", r.cut},
                            {"bos", r.bos},
                            {"file", o.file},
                            {"file_sha256", hash},
                            {"model", o.model.model},
                            {"bits_per_weight", m.size.bits_per_weight()},
                            {"seconds", seconds},
                            {"threads", num_threads()},
                            {"kernels", packed_isa_name()},
                            {"peak_memory_bytes", cli::peak_memory_bytes()}};
  fmt::print("{}\n", json_text(j, 2));
}

}  // namespace

// Nobody asked for windows longer than the model's context.
void shorten(Options& o) {
  const int64_t own = open_checkpoint(o.model.model)->config().usable_context();
  if (own >= o.perplexity.context) return;
  o.perplexity.context = own;
  if (!o.model.quiet) fmt::print(stderr, "windows of {} tokens: the model's context\n", own);
}

int ppl(const cli::Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  apply(o.model);
  const std::string text = read_input(o.file);
  const std::string hash = sha256(text);
  if (!o.context_given && o.perplexity.context > 0) shorten(o);
  const OpenModel m = open_model(o.model, o.perplexity.context);
  if (o.perplexity.context == 0) o.perplexity.context = m.model->context();
  cli::Progress progress("perplexity", 0, o.model.quiet);
  std::optional<cli::Progress> bar;
  const PerplexityResult r = evaluate_perplexity(
      *m.model, *m.tokenizer, text, o.perplexity,
      [&](int64_t done, int64_t total, double perplexity) {
        if (!bar)
          bar.emplace(o.perplexity.protocol == Protocol::Documents ? "document" : "window", total,
                      o.model.quiet);
        bar->update(done, fmt::format("perplexity {:.4f}", perplexity));
      });
  bar.reset();
  const double seconds = progress.seconds();
  if (o.json)
    print_json(o, r, hash, m, seconds);
  else
    print_method(o, r, hash);
  progress.finish(fmt::format("{} tokens in {}, {:.0f} t/s, peak memory {}",
                              r.windows > 0 ? r.predicted : 0, cli::human_seconds(seconds),
                              static_cast<double>(r.predicted) / seconds,
                              cli::human_bytes(static_cast<double>(cli::peak_memory_bytes()))));
  return 0;
}

}  // namespace omq::run
