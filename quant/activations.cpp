// Hooks on linears and attention that quantise what passes.
#include "quant/activations.h"

#include "autograd/ops.h"

namespace omq::quant {
namespace {

bool same(const Tensor& a, const Tensor& b) {
  return a.defined() && a.raw() == b.raw() && a.node() == b.node() && a.shape() == b.shape() &&
         a.strides() == b.strides();
}

}  // namespace

void quantize_activations(nn::Block& b, const QuantSpec& spec) {
  const ActivationBits bits = spec.activations();
  if (bits.linear < 16) {
    // q, k and v read one tensor, gate and up another: it is quantised once, its gradients meet
    // before they go through the quantiser.
    struct Last {
      Tensor x, quantised;  // x is held, so that its address stays a proof of identity
    };
    const auto last = std::make_shared<Last>();
    const auto once = [last, rows = spec.rows(bits.linear)](const Tensor& x) {
      if (!same(last->x, x)) *last = {x, fake_quant_rows(x, rows)};
      return last->quantised;
    };
    for (auto& [name, linear] : b.linears()) linear->pre = once;
  }
  const auto tap = [&](int n) -> std::function<Tensor(const Tensor&)> {
    if (n >= 16) return {};
    return [rows = spec.rows(n)](const Tensor& x) { return fake_quant_rows(x, rows); };
  };
  b.taps() = {tap(bits.q), tap(bits.k), tap(bits.v), tap(bits.p)};
}

}  // namespace omq::quant
