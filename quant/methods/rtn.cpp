// RTN: every weight to the nearest point of its group's min–max grid (and activations to that of
// their token's). The baseline of every table.
#include "quant/recipe.h"

namespace omq::quant {

Recipe rtn(const Options& o) {
  const GridRule rule =
      o.spec.symmetric && o.spec.official_symmetric ? official_symmetric_grid : affine_grid;
  return {.name = "rtn",
          .spec = o.spec,
          .transforms = {},
          .clip = [rule](const Tensor& w, GroupSpec spec) { return minmax_clip(w, spec, rule); },
          .rounder = round_nearest(),
          .objective = block_mse(),
          .augmented = false,
          .aug_weight = 1,
          .clip_search = false,
          .let = {},
          .train = {}};
}

}  // namespace omq::quant
