// The recipe that did best for such bits on docs/methods.md: a choice among the others, whose name
// and line the recipe carries. Weights of two and three bits learn themselves; activations of few
// bits want a rotated network and codes solved for what is left (measured at W4A4). Weights alone
// at four bits and more were not compared: learned clipping.
#include "quant/compose.h"

namespace omq::quant {

Recipe best(const Options& options) {
  Options o = options;
  if (o.spec.activations().linear == 16) return o.spec.wbits <= 3 ? efficientqat(o) : omniquant(o);
  if (o.line.clip.empty()) o.line.clip = "minmax";
  if (o.line.round.empty()) o.line.round = "gptq";
  if (o.act_clip < 0) o.act_clip = 1;
  if (o.qkv_clip < 0) o.qkv_clip = 1;
  return quarot(o);
}

}  // namespace omq::quant
