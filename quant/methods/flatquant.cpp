// FlatQuant (arXiv 2410.09426): learned affine transforms in front of every matrix, Kronecker
// products where they have to stay in the running model (transform_kronecker.h), and learned clip
// factors behind them. Shares of the ranges of matrices' inputs are learned, from QuaRot's fixed
// one; those of q, k and v, which a cache has once for the whole model, stay there.
#include <algorithm>

#include "quant/compose.h"

namespace omq::quant {

Recipe flatquant(const Options& options) {
  Options o = options;
  const ActivationBits bits = o.spec.activations();
  if (o.act_clip < 0 && bits.linear < 16) o.act_clip = 0.9;
  if (o.qkv_clip < 0 && std::min({bits.q, bits.k, bits.v}) < 16) o.qkv_clip = 0.95;
  return compose("flatquant", {"kronecker", "lwc", "nearest", "clip"}, o);
}

}  // namespace omq::quant
