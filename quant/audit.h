// Audit: the proofs that a sceptic would ask for, on any block and with any recipe.
//
//   gradients    of the block's loss in every learnable, in F64, against central differences of the
//                loss with its roundings frozen (autograd/frozen.h); and those that calibration
//                uses (F32, fused) against F64 with the same codes; what fails at one random point
//                is tried at a second, since the first may lie on a kink
//   transforms   leave the block's output as it is, for random learnables, at every site and at all
//   rotations    likewise, part by part and all together; the rest is then audited on the rotated
//                block
//   packing      what is stored is what was simulated, bit for bit, and kernels multiply it so
//
// Learnables are random and far from where calibration starts: names that end in "_scale" get
// factors in [1/4, 4], in "_shift" values of the size of the activations, in "_share" shares of 1;
// steps of grids are up to doubled or halved, weights moved by 30 %, matrices that transform by so
// much that it is 30 % of a row; all others get their start plus a normal number. A method or piece
// that is added later is audited without a change here.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "quant/recipe.h"

namespace omq::quant {

// One proof, tried.
struct AuditCheck {
  std::string name;      // "gradient of lwc.gamma_logit"
  std::string compared;  // "backward, differences: 7 tensors, 85120 entries"
  double worst = 0, bound = 0;
  std::string where;  // of the worst
  std::string fault;  // why it could not be tried: then it failed
  bool ok() const { return fault.empty() && worst <= bound; }
};

struct AuditInputs {
  Tensor x;  // F32 [1,T,D]: what goes into the block
  nn::Positions at;
};

struct AuditOptions {
  int64_t gradient_tokens = 6;  // of x, for gradients
  int entries = 2;              // of a learnable that are moved alone; and once all together
  uint64_t seed = 2;
};

// What of a method is audited.
struct AuditedRecipe {
  std::string name;  // "omniquant", "omniquant + let"
  Recipe recipe;
};
// Every row of methods.def: as the options have it, and where it can transform with all sites and
// shifts that the options do not forbid. `only`: of one method.
std::vector<AuditedRecipe> audited_recipes(const Options& options, std::string_view only = {});

// Every check that applies to the recipe, each told to `found` when it is done. fp: dense, F32, on
// the CPU; it stays as it is. Returns whether all passed.
bool audit_block(const Recipe& recipe, nn::Block& fp, const AuditInputs& inputs,
                 const AuditOptions& options, const std::function<void(const AuditCheck&)>& found);

}  // namespace omq::quant
