// How a learning rate falls over the steps of a run, for host and device: the number of the step is
// in the optimiser's clock, so a recorded step needs nothing from the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "tensor/numeric.h"

namespace omq {

enum class RateShape : uint8_t { Constant, Cosine, Linear };

struct RateSchedule {
  RateShape shape = RateShape::Constant;
  double steps = 1;  // of the whole run
  double done = 0;   // of them, before this optimiser's first
  double last = 0;   // share of the rate that is left in the end

  // Of the rate, for the t-th step of this optimiser (from 1): 1 in the run's first step.
  OMQ_HD double share(double t) const {
    if (shape == RateShape::Constant) return 1;
    const double at = (done + t - 1) / steps, p = at < 0 ? 0 : at > 1 ? 1 : at;
    const double fall = shape == RateShape::Linear ? p : (1 - cos(3.14159265358979323846 * p)) / 2;
    return 1 - (1 - last) * fall;
  }
};

}  // namespace omq
