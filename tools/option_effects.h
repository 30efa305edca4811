// Options of omq-quant that would change nothing in the run that was asked for. They are refused:
// whoever writes one expects something of it. Only what was written counts; presets and methods set
// what they like.
#pragma once

#include <set>
#include <string>

#include "tools/quant_options.h"

namespace omq {

// ParamGroup names of what a run of this recipe lets learn, where it has epochs at all.
std::set<std::string> learning_groups(const quant::Recipe& recipe);

// recipe: what the options, settled, stand for. Throws UsageError that names the option, why it has
// no effect, and what would give it one.
void check_effects(const CLI::App& app, const QuantOptions& options, const quant::Recipe& recipe);
// The same for omq-quant audit.
void check_audit_effects(const CLI::App& app);

}  // namespace omq
