// QuaRot (arXiv 2404.00456): the network is rotated, then rounded to nearest. Rotations that have
// to stay in the running model are made only where what they rotate is quantised.
#include "quant/recipe.h"

namespace omq::quant {

Recipe quarot(const Options& o) {
  Recipe r = rtn(o);
  r.name = "quarot";
  const ActivationBits a = o.spec.activations();
  r.rotation = {.seed = o.rotation_seed,
                .heads = a.linear < 16,
                .down = a.linear < 16,
                .query_key = a.q < 16 || a.k < 16};
  return r;
}

}  // namespace omq::quant
