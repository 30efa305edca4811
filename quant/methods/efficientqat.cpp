// EfficientQAT's block phase (arXiv 2407.11062): weights, scales and zero points are all free and
// learn block by block against the full-precision output (weights_plan in plans.cpp).
#include "quant/compose.h"

namespace omq::quant {

Recipe efficientqat(const Options& o) {
  return compose("efficientqat", {"none", "free", "nearest", "weights"}, o);
}

}  // namespace omq::quant
