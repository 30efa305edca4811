// OmniQuant, weight-only: learnable weight clipping against the block objective (arXiv
// 2308.13137v3, Eq. 1 and 2; settings of spec omniquant §12: 20 epochs, at 2 bits 40 and the
// augmented loss).
#include "quant/recipe.h"

namespace omq::quant {

Recipe omniquant(const Options& o) {
  const bool two_bits = o.spec.wbits == 2;
  const bool augmented = o.aug_loss < 0 ? two_bits : o.aug_loss != 0;
  return {
      .name = "omniquant",
      .spec = o.spec,
      .transforms = {},
      .clip = [](const Tensor& w, GroupSpec spec) { return learned_clip(w, spec, {.logit = 4.0}); },
      .rounder = round_nearest(),
      .objective = augmented ? augmented_mse() : block_mse(),
      .augmented = augmented,
      .train = {.epochs = o.epochs >= 0 ? o.epochs
                          : two_bits    ? 40
                                        : 20,
                .batch_size = o.batch_size,
                .lr = {{"lwc", o.lwc_lr}},
                .weight_decay = o.weight_decay,
                .compute = o.compute}};
}

}  // namespace omq::quant
