// SignRound, the method of AutoRound (arXiv 2309.05516): an offset for every weight before it is
// rounded, and shares of both ends of the range, moved against the signs of their gradients
// (rounding_plan in plans.cpp).
#include "quant/compose.h"

namespace omq::quant {

Recipe signround(const Options& o) {
  return compose("signround", {"none", "scaled", "learned", "clip"}, o);
}

}  // namespace omq::quant
