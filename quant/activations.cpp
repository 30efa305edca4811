// Bits into grids.
#include "quant/activations.h"

namespace omq::quant {

void quantize_activations(nn::Block& b, const QuantSpec& spec) {
  const ActivationBits bits = spec.activations();
  const auto rows = [&](int n) -> std::optional<RowQuant> {
    if (n >= 16) return std::nullopt;
    return spec.rows(n);
  };
  nn::quantize_activations(
      b, {rows(bits.linear), rows(bits.q), rows(bits.k), rows(bits.v), rows(bits.p)});
}

}  // namespace omq::quant
