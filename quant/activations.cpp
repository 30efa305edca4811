// Bits into grids.
#include "quant/activations.h"

namespace omq::quant {

void quantize_activations(nn::Block& b, const QuantSpec& spec) {
  const ActivationBits bits = spec.activations();
  const auto rows = [&](int n, double clip) -> std::optional<RowQuant> {
    if (n >= 16) return std::nullopt;
    return spec.rows(n, clip);
  };
  nn::quantize_activations(
      b, {rows(bits.linear, spec.act_clip), rows(bits.q, spec.qkv_clip),
          rows(bits.k, spec.qkv_clip), rows(bits.v, spec.qkv_clip), rows(bits.p, 1)});
}

}  // namespace omq::quant
