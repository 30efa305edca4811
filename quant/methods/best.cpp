// The recipe that did best for such bits on docs/methods.md: a choice among the others, whose name
// and line the recipe carries. Weights of two and three bits learn themselves; for activations of
// four bits transforms are learned; for those of more bits fixed rotations behind the norms, and
// codes solved for what is left, do. Weights alone at four bits and more were not compared: learned
// clipping.
#include "quant/compose.h"

namespace omq::quant {

Recipe best(const Options& options) {
  Options o = options;
  const int inputs = o.spec.activations().linear;
  if (inputs == 16) return o.spec.wbits <= 3 ? efficientqat(o) : omniquant(o);
  if (inputs <= 4 && o.rotate_norms < 0) return flatquant(o);
  if (o.rotate_norms < 0) o.rotate_norms = 1;
  if (o.line.round.empty()) o.line.round = "gptq";
  return quarot(o);
}

}  // namespace omq::quant
