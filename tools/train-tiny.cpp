// train-tiny: trains the bundled model from nothing and writes its folder.
//
//   train-tiny --out tests/fixtures/tiny-llama --force
//
// One run gives everything: config.json, model.safetensors (F16), tokenizer.json,
// tokenizer_config.json, generation_config.json, calib.txt and test.txt of stories that training
// did not see, and a README.md with the command and what was reached. The files depend on the
// options alone, not on the number of threads.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "models/atomic_dir.h"
#include "tensor/parallel.h"
#include "tools/cli.h"
#include "tools/tiny_training.h"

namespace omq {
namespace {

struct Arguments {
  std::string out;
  bool force = false;
  int threads = 0;
  int64_t eval_every = 0;
  TinyOptions train;
};

// Loss and time: rewritten in place on a terminal, a line every twentieth of the run elsewhere.
class Progress {
 public:
  explicit Progress(int64_t steps)
      : steps_(steps),
        terminal_(cli::is_terminal(stderr)),
        start_(std::chrono::steady_clock::now()) {}

  void step(const TinyStep& s) {
    average_ = s.step == 1 ? s.loss : 0.95 * average_ + 0.05 * s.loss;
    const bool line =
        s.step == 1 || s.step == steps_ || s.step % std::max<int64_t>(1, steps_ / 20) == 0;
    if (!line && !(terminal_ && s.step % 5 == 0)) return;
    const double passed = seconds();
    const double left = passed / static_cast<double>(s.step) * static_cast<double>(steps_ - s.step);
    fmt::print(
        stderr, "{}step {:>5}/{}  loss {:.4f}  mean {:.4f}  |g| {:5.2f}  lr {:.2e}  {}, {} left{}",
        terminal_ ? "\r" : "", s.step, steps_, s.loss, average_, s.gradient_norm, s.lr,
        cli::human_seconds(passed), cli::human_seconds(left), line || !terminal_ ? "\n" : "\033[K");
  }
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  double average() const { return average_; }

 private:
  int64_t steps_;
  bool terminal_;
  std::chrono::steady_clock::time_point start_;
  double average_ = 0;
};

std::string command(const Arguments& a) {
  const TinyOptions d, &o = a.train;
  std::string out = fmt::format("train-tiny --out {} --seed {} --steps {}", a.out, o.seed, o.steps);
  const auto option = [&out](const char* name, auto value, auto standard) {
    if (value != standard) out += fmt::format(" {} {}", name, value);
  };
  option("--batch", o.batch, d.batch);
  option("--window", o.window, d.window);
  option("--hidden", o.hidden, d.hidden);
  option("--layers", o.layers, d.layers);
  option("--heads", o.heads, d.heads);
  option("--kv-heads", o.kv_heads, d.kv_heads);
  option("--ffn", o.ffn, d.ffn);
  option("--vocab", o.vocab, d.vocab);
  option("--lr", o.lr, d.lr);
  option("--calib-bytes", o.calib_bytes, d.calib_bytes);
  option("--test-bytes", o.test_bytes, d.test_bytes);
  return out;
}

struct Outcome {
  double train_loss = 0, test_loss = 0;
  int64_t parameters = 0;
  std::string prompt, sample;
};

std::string readme(const Arguments& a, const Outcome& r) {
  const TinyOptions& o = a.train;
  std::string out = "# tiny-llama\n\n";
  out += fmt::format(
      "A LLaMA of {} weights (hidden {}, {} layers, {} heads on {} key/value heads, ffn {}, {} "
      "tokens, tied head),\n"
      "trained from nothing on stories of the grammar in `tools/story_grammar.cpp`. Everything in "
      "this folder, this\n"
      "file too, was written by\n\n    {}\n\n",
      r.parameters, o.hidden, o.layers, o.heads, o.kv_heads, o.ffn, o.vocab, command(a));
  out += fmt::format(
      "{} steps of {} windows of {} tokens. Loss at the end of training: {:.4f} nats per token. "
      "Loss over `test.txt`\n"
      "(windows of {}, the token behind each predicted too, weights rounded to F16): {:.4f}, a "
      "perplexity of {:.4f}.\n\n",
      o.steps, o.batch, o.window, r.train_loss, o.window, r.test_loss, std::exp(r.test_loss));
  out +=
      "`calib.txt` and `test.txt` are stories of other seeds than those of training, an empty line "
      "after each. The\n"
      "same command gives the same bytes on the same kind of processor, with any number of "
      "threads.\n\n";
  return out + fmt::format("Greedy continuation of \"{}\":\n\n>{}\n", r.prompt, r.sample);
}

void run(const Arguments& a) {
  const TinyOptions& o = a.train;
  if (a.threads > 0) set_num_threads(a.threads);
  tiny_config(o);                 // refuse impossible sizes
  AtomicDir out(a.out, a.force);  // and an impossible place before the work
  const Tokenizer tokenizer = tiny_tokenizer(o);
  const std::string test = make_stories(o.seed, StorySplit::Test, o.test_bytes);
  const std::vector<int32_t> test_ids = tokenizer.encode(test);
  fmt::print(stderr, "tokenizer: {} tokens, {:.2f} bytes of story a token\n",
             tokenizer.vocab_size(),
             static_cast<double>(test.size()) / static_cast<double>(test_ids.size()));

  Progress progress(o.steps);
  const auto report = [&](const TinyStep& s, const TinyModel& m) {
    progress.step(s);
    if (a.eval_every > 0 && s.step % a.eval_every == 0)
      fmt::print(stderr, "step {:>5}: held-out perplexity {:.4f}\n", s.step,
                 std::exp(mean_loss(m, test_ids, o.window)));
  };
  TinyModel model = train_tiny(o, tokenizer, report);
  round_to_f16(model);

  Outcome r;
  r.train_loss = progress.average();
  r.test_loss = mean_loss(model, test_ids, o.window);
  model.visit([&](const std::string&, Tensor& t) { r.parameters += t.numel(); });
  r.prompt = test.substr(0, test.find('.') + 1);
  r.sample = tokenizer.decode(
      continue_greedily(model, tokenizer.encode(r.prompt), 150, tokenizer.eos_ids().at(0)));
  r.sample = r.sample.substr(0, r.sample.find('\n'));

  save_tensors(model, out.path() / "model.safetensors");
  out.write("config.json", model.config.to_hf_json().dump(2) + "\n");
  out.write("tokenizer.json", tokenizer.to_tokenizer_json());
  out.write("tokenizer_config.json", tokenizer.to_tokenizer_config_json());
  out.write("generation_config.json", tokenizer.to_generation_config_json());
  out.write("calib.txt", make_stories(o.seed, StorySplit::Calib, o.calib_bytes));
  out.write("test.txt", test);
  out.write("README.md", readme(a, r));
  out.commit();
  fmt::print(stderr, "{}: {} weights, held-out perplexity {:.4f}, {}\n", a.out, r.parameters,
             std::exp(r.test_loss), cli::human_seconds(progress.seconds()));
  fmt::print("{}{}\n", r.prompt, r.sample);
}

void add_options(CLI::App& app, Arguments& a) {
  TinyOptions& o = a.train;
  const CLI::Range positive(int64_t{1}, int64_t{1} << 20);
  app.add_option("-o,--out", a.out, "Folder to write (required)");
  app.add_flag("--force", a.force, "Replace the folder if it is an older model");
  app.add_option("--steps", o.steps, "Optimiser steps")->check(positive)->capture_default_str();
  app.add_option("--seed", o.seed, "Weights, stories, order")->capture_default_str();
  app.add_option("--threads", a.threads, "CPU threads (0: all)")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--batch", o.batch, "Windows a step")->check(positive)->capture_default_str();
  app.add_option("--window", o.window, "Tokens a window, and the model's context")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 16))
      ->capture_default_str();
  app.add_option("--hidden", o.hidden, "Hidden size")->check(positive)->capture_default_str();
  app.add_option("--layers", o.layers, "Layers")->check(positive)->capture_default_str();
  app.add_option("--heads", o.heads, "Query heads")->check(positive)->capture_default_str();
  app.add_option("--kv-heads", o.kv_heads, "Key/value heads")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--ffn", o.ffn, "Size of the feed-forward layer")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--vocab", o.vocab, "Tokens")
      ->check(CLI::Range(int64_t{257}, int64_t{4096}))
      ->capture_default_str();
  app.add_option("--lr", o.lr, "Highest learning rate")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--calib-bytes", o.calib_bytes, "Size of calib.txt")->capture_default_str();
  app.add_option("--test-bytes", o.test_bytes, "Size of test.txt")->capture_default_str();
  app.add_option("--eval-every", a.eval_every,
                 "Steps between held-out perplexities (0: at the end only)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
}

int program(const cli::Args& args) {
  Arguments a;
  bool version = false;
  CLI::App app("Trains a small LLaMA on generated stories and writes it as a Hugging Face folder.",
               "train-tiny");
  add_options(app, a);
  app.add_flag("--version", version, "Say what this build is");
  if (!cli::parse(app, args)) return 0;
  if (version) {
    fmt::print("{}", cli::version_text("train-tiny"));
    return 0;
  }
  if (a.out.empty()) throw cli::UsageError("--out is required: the folder to write");
  run(a);
  return 0;
}

}  // namespace
}  // namespace omq

int main(int argc, char** argv) {
  return omq::cli::run_program("train-tiny", argc, argv, omq::program);
}
