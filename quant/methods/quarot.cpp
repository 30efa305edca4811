// QuaRot (arXiv 2404.00456): the network is rotated, then rounded to nearest on grids that a search
// clips; dynamic ranges of activations are clipped at the paper's fixed shares. Rotations that have
// to stay in the running model are made only where what they rotate is quantised.
#include <algorithm>

#include "quant/compose.h"

namespace omq::quant {

Recipe quarot(const Options& options) {
  Options o = options;
  const ActivationBits bits = o.spec.activations();
  if (o.act_clip < 0 && bits.linear < 16) o.act_clip = 0.9;
  if (o.qkv_clip < 0 && std::min({bits.q, bits.k, bits.v}) < 16) o.qkv_clip = 0.95;
  Recipe r = compose("quarot", {"none", "mse", "nearest", "none"}, o);
  r.rotation = rotations_for(o.spec, o.rotation_seed, o.rotate_norms == 1);
  const RotationOptions& rotation = *r.rotation;
  check(!r.kronecker || !(rotation.norms || rotation.heads || rotation.down || rotation.query_key),
        "--transform kronecker: where method quarot rotates online already nothing can be learned; "
        "take --method flatquant");
  return r;
}

}  // namespace omq::quant
