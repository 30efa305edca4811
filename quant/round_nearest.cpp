// Round to nearest.
#include "quant/rounder.h"
#include "tensor/kernels.h"

namespace omq::quant {
namespace {

struct Nearest final : Rounder {
  Tensor codes(const Tensor& w, const Grid& grid, GroupSpec spec, const Tensor&) const override {
    Tensor q = Tensor::empty(w.shape(), DType::U8, w.device());
    on(w).quantize_codes(q, w, grid.scale, grid.zero, spec);
    return q;
  }
};

}  // namespace

std::shared_ptr<const Rounder> round_nearest() {
  static const auto rounder = std::make_shared<const Nearest>();
  return rounder;
}

}  // namespace omq::quant
