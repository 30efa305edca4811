// Rounder: from a weight matrix and its grid to codes.
#pragma once

#include <memory>

#include "quant/clip.h"

namespace omq::quant {

struct Rounder {
  virtual ~Rounder() = default;
  // Whether codes() looks at what the matrix is multiplied with.
  virtual bool wants_hessian() const { return false; }
  // w [rows, cols] → U8 [rows, cols]. hessian: F32 or F64 [cols, cols], a multiple of Xᵀ·X over
  // calibration tokens (quant/hessian.h); undefined where none is wanted.
  virtual Tensor codes(const Tensor& w, const Grid& grid, GroupSpec spec,
                       const Tensor& hessian) const = 0;
};

// Each weight to its nearest code, half to even (spec omniquant §2.4).
std::shared_ptr<const Rounder> round_nearest();

struct GptqOptions {
  double damping = 0.01;  // share of the mean of H's diagonal that is added to it
  bool act_order = true;  // columns with the largest inputs first
};
// GPTQ (spec weight-methods §10): codes one column after the other, each error made good as far as
// columns to come can, so that ‖(W − Ŵ)·Xᵀ‖ is small rather than ‖W − Ŵ‖. Grids stay as they are
// ("static groups"). Throws Error when H is not finite, or not positive at a damping of 1.
std::shared_ptr<const Rounder> round_gptq(GptqOptions options = {});

}  // namespace omq::quant
