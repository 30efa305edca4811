// See option_effects.h. Rules are tried in their order; the first that complains is told.
#include "tools/option_effects.h"

#include <CLI/CLI.hpp>

namespace omq {
namespace {

using cli::UsageError;

struct Run {
  const QuantOptions& o;
  const quant::Recipe& r;
  std::set<std::string> groups;  // that learn

  bool learns() const { return r.train.epochs > 0; }
  // "method gptq --clip lwc"; best stands for one of the others.
  std::string method() const {
    return o.method == "best" ? fmt::format("method best (here {})", r.title) : "method " + r.title;
  }
  // Where there is none; --let is for what it can learn with.
  std::string no_transform() const {
    return fmt::format("there is no transformation to act on; add {}",
                       r.train.clips ? "--let" : "--transform let");
  }
  std::string rates() const {
    return fmt::format("--rate GROUP=X sets those of {}", fmt::join(groups, ", "));
  }
};

std::string trains(const Run& run) {
  if (run.r.line.train != "none") return "";
  return run.method() + " learns nothing; leave it out, or add --train";
}

std::string learns(const Run& run) {
  if (std::string none = trains(run); !none.empty()) return none;
  return run.learns() ? "" : "nothing is learned at --epochs 0";
}

// Norm Tweaking compares means and variances, with a loss of its own.
std::string block_error(const Run& run) {
  const bool has = run.learns() && run.r.line.train != "norms";
  return has ? "" : run.method() + " learns from no block's error here; leave it out";
}

// Shares of activations take it too, but where rates are for a whole run (quant/plans.cpp).
std::string clip_rate(const Run& run) {
  const bool inputs = run.groups.contains("lac") && !run.r.train.rounding;
  if (run.groups.contains("lwc") || inputs) return "";
  return fmt::format("{} learns no clipping factors; {}", run.method(), run.rates());
}

std::string let_rate(const Run& run) {
  if (run.groups.contains("let")) return "";
  if (run.r.let) return run.method() + " learns nothing of the transformation";
  if (run.r.kronecker)
    return fmt::format("{} learns transforms of another kind; {}", run.method(), run.rates());
  return run.no_transform();
}

std::string let_shift(const Run& run) {
  if (run.r.let) return "";
  if (run.r.kronecker) return run.method() + " has no shifts; leave it out";
  return run.no_transform();
}

std::string transform(const Run& run) {
  return run.r.let || run.r.kronecker ? "" : run.no_transform();
}

std::string clip_start(const Run& run) {
  if (run.r.line.clip == "lwc") return "";
  return fmt::format("{} has no clipping factors to start; add --clip lwc{}", run.method(),
                     run.r.train.clips ? "" : " --train clip");
}

std::string any_windows(const Run& run) {
  if (!run.o.calib.empty() || !run.o.calib_ids.empty()) return "";
  return "there is no text to take windows of; add --calib FILE";
}

std::string text_windows(const Run& run) {
  if (run.o.calib_ids.empty()) return any_windows(run);
  return "--calib-ids has its windows as they are; leave it out, or give text with --calib";
}

std::string evaluates(const Run& run) {
  return run.o.eval.empty() ? "nothing is evaluated; add --eval ppl:FILE" : "";
}

struct Rule {
  std::vector<const char*> options;
  std::string (*complaint)(const Run&);  // empty where the options have an effect
};
const Rule kRules[] = {
    {{"--epochs"}, trains},
    {{"--batch-size", "--wd", "--lwc-lr", "--let-lr", "--train-inputs", "--schedule",
      "--keep-epoch"},
     learns},
    {{"--aug-loss", "--no-aug-loss", "--aug-weight", "--token-loss", "--no-token-loss"},
     block_error},
    {{"--lwc-lr"}, clip_rate},
    {{"--alpha"}, transform},
    {{"--no-let-shift"}, let_shift},
    {{"--let-lr"}, let_rate},
    {{"--clip-search"}, clip_start},
    {{"--nsamples"}, any_windows},
    {{"--seqlen", "--seed"}, text_windows},
    {{"--eval-context", "--eval-chunks"}, evaluates},
};

void check_rates(const Run& run) {
  for (const auto& [group, rate] : run.o.recipe.rates) {
    const std::string option = fmt::format("--rate {}={}: ", group, rate);
    if (const std::string none = learns(run); !none.empty()) throw UsageError(option + none);
    if (!run.groups.contains(group))
      throw UsageError(
          fmt::format("{}{} has none that learn; {}", option, run.method(), run.rates()));
  }
}

bool written(const CLI::App& app, const char* option) {
  return app.get_option(option)->count() > 0;
}

}  // namespace

std::set<std::string> learning_groups(const quant::Recipe& r) {
  const quant::TrainPlan& t = r.train;
  const std::pair<const char*, bool> all[] = {{"lwc", t.clips && r.line.clip == "lwc"},
                                              {"grid", t.clips && r.line.clip == "free"},
                                              {"range", t.clips && r.line.clip == "scaled"},
                                              {"let", t.clips && r.let.has_value()},
                                              {"lac", t.act_clips},
                                              {"kronecker", t.clips && r.kronecker.has_value()},
                                              {"weights", t.weights},
                                              {"norms", t.norms},
                                              {"rounding", t.rounding}};
  std::set<std::string> groups;
  for (const auto& [name, learns] : all)
    if (learns) groups.insert(name);
  return groups;
}

void check_effects(const CLI::App& app, const QuantOptions& o, const quant::Recipe& recipe) {
  const Run run{o, recipe, learning_groups(recipe)};
  for (const Rule& rule : kRules)
    for (const char* option : rule.options)
      if (written(app, option))
        if (const std::string why = rule.complaint(run); !why.empty())
          throw UsageError(fmt::format("{}: {}", option, why));
  check_rates(run);
}

void check_audit_effects(const CLI::App& app) {
  const std::pair<std::vector<const char*>, const char*> rules[] = {
      {{"--rate", "--schedule", "--keep-epoch", "--train-inputs", "--let-lr"},
       "an audit takes no learning step"},
      {{"--alpha", "--one-consumer", "--signed-max"},
       "an audit gives the transformation random scales"}};
  for (const auto& [options, why] : rules)
    for (const char* option : options)
      if (written(app, option)) throw UsageError(fmt::format("{}: {}; leave it out", option, why));
}

}  // namespace omq
