// See composition_options.h.
#include "tools/composition_options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace omq {
namespace {

using cli::UsageError;

// ParamGroup names (quant/block_method.cpp, clips and transforms).
const std::vector<std::string> kGroups = {"lwc",   "let",     "kronecker", "lac",     "grid",
                                          "range", "weights", "norms",     "rounding"};

template <class T> using Names = std::vector<std::pair<const char*, T>>;
const Names<RateShape> kShapes = {{"constant", RateShape::Constant},
                                  {"linear", RateShape::Linear},
                                  {"cosine", RateShape::Cosine}};
const Names<bool> kEpochs = {{"last", false}, {"best", true}};

// What a name stands for; nothing where none is given. Throws UsageError for another.
template <class T>
std::optional<T> named(const char* option, const std::string& name, const Names<T>& names) {
  if (name.empty()) return {};
  std::string known;
  for (const auto& [text, value] : names) {
    if (name == text) return value;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", text);
  }
  throw UsageError(fmt::format("{} {}: one of {} wanted", option, name, known));
}

}  // namespace

void add_composition_options(CLI::App& app, CompositionFlags& f) {
  const char* group = "Pieces of the method (a method is a name for such a line; these win)";
  const auto piece = [&](const char* name, std::string& value, const char* help) {
    app.add_option(name, value, help)->type_name("NAME")->group(group);
  };
  piece("--transform", f.transform,
        "none; let: the equivalent transformation; kronecker: learned affine ones, "
        "partly online");
  piece("--clip", f.clip,
        "grids from: minmax ranges; lwc, with learned factors; scaled, with learned shares; free "
        "scales and zero points");
  piece("--round", f.round,
        "codes: nearest; gptq, solved on the inputs of each matrix; learned offsets");
  piece("--train", f.train,
        "none; clip: what clip, transform and rounding learn; weights: these, weights and norms; "
        "norms, after rounding");
  app.add_option("--rate", f.rates,
                 "learning rate of a group: lwc, lac, let, kronecker, grid, range, weights, norms, "
                 "rounding "
                 "(with --round learned all are for a whole run, divided by its steps)")
      ->type_name("GROUP=X")
      ->group(group);
  app.add_option("--train-inputs", f.inputs,
                 "what a block learns from: quantised, the outputs of the blocks before it "
                 "(default), or full, those in full precision (FlatQuant's paper)")
      ->type_name("WHICH")
      ->group(group);
  app.add_option("--schedule", f.schedule,
                 "how learning rates fall over a block's steps: constant, linear or cosine "
                 "(default: the method's; omniquant constant)")
      ->type_name("SHAPE")
      ->group(group);
  app.add_option("--keep-epoch", f.keep_epoch,
                 "what a block ends with: last, or best, the epoch with the smallest loss "
                 "(default: the method's; omniquant last)")
      ->type_name("WHICH")
      ->group(group);
  app.add_option("--damping", f.damping,
                 "share of the mean that gptq adds to the diagonal of the products (default 0.01)")
      ->type_name("X")
      ->group(group);
  app.add_flag("--no-act-order", f.no_act_order,
               "gptq takes columns as they come, not those with large inputs first")
      ->group(group);
}

void settle_composition(const CompositionFlags& f, quant::Options& o) {
  o.line = {f.transform, f.clip, f.round, f.train};
  for (const std::string& item : f.rates) {
    const size_t at = std::min(item.find('='), item.size());
    const std::string name = item.substr(0, at), text = item.substr(std::min(at + 1, item.size()));
    char* end = nullptr;
    const double rate = std::strtod(text.c_str(), &end);
    if (std::find(kGroups.begin(), kGroups.end(), name) == kGroups.end())
      throw UsageError(fmt::format("--rate {}: GROUP=X wanted, GROUP one of {}", item,
                                   fmt::join(kGroups, ", ")));
    if (text.empty() || *end != '\0' || !std::isfinite(rate) || rate <= 0)
      throw UsageError(fmt::format("--rate {}: a number above 0 wanted", item));
    o.rates[name] = rate;
  }
  if (f.damping && !(*f.damping > 0 && *f.damping <= 1))
    throw UsageError("--damping: above 0, at most 1");
  o.damping = f.damping.value_or(-1);
  o.act_order = !f.no_act_order;
  if (const auto full =
          named<bool>("--train-inputs", f.inputs, {{"full", true}, {"quantised", false}}))
    o.full_inputs = *full;
  o.rate_shape = named("--schedule", f.schedule, kShapes);
  o.keep_best = named("--keep-epoch", f.keep_epoch, kEpochs);
}

void check_composition(const CompositionFlags& f, const quant::Recipe& r) {
  if (r.rounder->wants_hessian()) return;
  for (const auto& [given, name] :
       {std::pair{f.damping.has_value(), "--damping"}, {f.no_act_order, "--no-act-order"}})
    if (given) throw UsageError(fmt::format("{}: nothing is solved; add --round gptq", name));
}

}  // namespace omq
