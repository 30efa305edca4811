// Transform: an edit of a block that leaves its full-precision output unchanged, so that what is
// quantised afterwards is easier to quantise (paper Eq. 3–5).
//
// Contract, held by a property test for every transform: for any value of its learnables, apply()
// on a copy of a block gives the same output within rounding while quantisers are off. apply()
// edits tensors of `b` by replacing them (the copy shares every Storage with the original) and is
// differentiable in the learnables.
#pragma once

#include "nn/adamw.h"
#include "nn/block.h"

namespace omq::quant {

struct Transform {
  virtual ~Transform() = default;
  virtual void apply(nn::Block& b) const = 0;
  virtual nn::ParamGroup params() const = 0;
  // Puts learnables that a step has taken out of their set back into it, in place. Called before
  // every apply().
  virtual void project() const {}
};

}  // namespace omq::quant
