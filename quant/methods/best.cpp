// The recipe that did best for such bits on docs/methods.md: a choice among the others, whose name
// and line the recipe carries. Weights of two and three bits learn themselves; activations of few
// bits want rotations behind the norms and codes solved for what is left (measured at W4A4).
// Weights alone at four bits and more were not compared: learned clipping.
#include "quant/compose.h"

namespace omq::quant {

Recipe best(const Options& options) {
  Options o = options;
  if (o.spec.activations().linear == 16) return o.spec.wbits <= 3 ? efficientqat(o) : omniquant(o);
  if (o.rotate_norms < 0) o.rotate_norms = 1;
  if (o.line.round.empty()) o.line.round = "gptq";
  return quarot(o);
}

}  // namespace omq::quant
