// RTN: every weight to the nearest point of its group's min–max grid. The baseline of every table.
#include "quant/recipe.h"

namespace omq::quant {

Recipe rtn(const Options& o) {
  return {.name = "rtn",
          .spec = o.spec,
          .transforms = {},
          .clip = minmax_clip,
          .rounder = round_nearest(),
          .objective = block_mse(),
          .augmented = false,
          .train = {}};
}

}  // namespace omq::quant
