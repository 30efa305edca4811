// The part of omq-quant's command line that names the pieces of a recipe (quant/recipe.h, Line): a
// method is a name for such a line, and flags given win over it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "quant/recipe.h"
#include "tools/cli.h"

namespace omq {

struct CompositionFlags {
  std::string transform, clip, round, train;
  std::vector<std::string> rates;  // "weights=1e-5"
  std::optional<double> damping;
  std::string inputs, schedule, keep_epoch;
  bool no_act_order = false;
};

void add_composition_options(CLI::App& app, CompositionFlags& flags);

// Flags into options. Throws UsageError for a rate that is none.
void settle_composition(const CompositionFlags& flags, quant::Options& options);

// Throws UsageError for flags that have nothing to act on in the recipe that came out.
void check_composition(const CompositionFlags& flags, const quant::Recipe& recipe);

}  // namespace omq
