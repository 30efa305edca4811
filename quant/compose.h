// From a Line to a Recipe: pieces by name, each with the training plan of the paper that it comes
// from. What a method's file holds is its line.
#pragma once

#include "quant/recipe.h"

namespace omq::quant {

// How something is learned.
struct Plan {
  TrainPlan train;
  Objective objective;
};
// The plans of the papers, with the user's options over them (methods/omniquant.cpp, plans.cpp).
Plan clip_plan(const Options& o);       // OmniQuant: clip factors and transformation
Plan weights_plan(const Options& o);    // EfficientQAT's block phase: weights and free grids
Plan rounding_plan(const Options& o);   // SignRound: offsets and shares of the range
Plan norms_plan(const Options& o);      // Norm Tweaking: gains of norms, after rounding
Plan kronecker_plan(const Options& o);  // FlatQuant: learned Kronecker transforms and clip factors
LetOptions let_options(const Options& o);
// The error of the block's output, as these options want it.
Objective block_objective(const Options& o, bool augmented, TokenWeight usual);

// The recipe of `usual` with the pieces that the options name instead. Throws Error when a piece is
// unknown, or one has no use for another.
Recipe compose(const std::string& method, const Line& usual, const Options& o);

}  // namespace omq::quant
