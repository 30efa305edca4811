// Norm Tweaking (arXiv 2309.02784) over GPTQ: codes are fixed first, then the gains of the block's
// norms learn to give every channel of its output the mean and variance that it has in full
// precision (norms_plan in plans.cpp). Windows are the calibration text, not sequences that the
// model wrote.
#include "quant/compose.h"

namespace omq::quant {

Recipe norm_tweaking(const Options& o) {
  return compose("norm-tweaking", {"none", "minmax", "gptq", "norms"}, o);
}

}  // namespace omq::quant
