// Rounder: from a weight matrix and its grid to codes.
#pragma once

#include <memory>

#include "quant/clip.h"

namespace omq::quant {

struct Rounder {
  virtual ~Rounder() = default;
  virtual Tensor codes(const Tensor& w, const Grid& grid,
                       GroupSpec spec) const = 0;  // U8 [rows, cols]
};

// Each weight to its nearest code, half to even (spec omniquant §2.4).
std::shared_ptr<const Rounder> round_nearest();

}  // namespace omq::quant
