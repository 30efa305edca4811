// QuaRot (arXiv 2404.00456): the network is rotated, then rounded to nearest. Rotations that have
// to stay in the running model are made only where what they rotate is quantised.
#include "quant/compose.h"

namespace omq::quant {

Recipe quarot(const Options& o) {
  Recipe r = compose("quarot", {"none", "minmax", "nearest", "none"}, o);
  r.rotation = rotations_for(o.spec, o.rotation_seed);
  return r;
}

}  // namespace omq::quant
