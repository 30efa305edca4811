// Blocks between devices, and what is quantised on its way through one.
#include "nn/block.h"

#include "autograd/ops.h"

namespace omq::nn {

void change_tensors(Block& block, const std::function<Tensor(const Tensor&)>& change) {
  std::vector<std::pair<Tensor, Tensor>> changed;  // the former are held, so that addresses differ
  block.visit([&](std::string_view, Tensor& t) {
    if (!t.defined()) return;
    for (const auto& [from, to] : changed)
      if (from.raw() == t.raw() && from.shape() == t.shape() && from.strides() == t.strides()) {
        t = to;
        return;
      }
    changed.emplace_back(t, change(t));
    t = changed.back().second;
  });
}

void move_to(Block& block, Device device) {
  change_tensors(block,
                 [device](const Tensor& t) { return t.device() == device ? t : to(t, device); });
}

void narrow_exact(Block& block) {
  NoGrad off;
  for (auto& [name, linear] : block.linears()) {
    if (linear->is_packed() || linear->dense().dtype() != DType::F32) continue;
    const Tensor w = linear->dense();
    for (const DType type : {DType::BF16, DType::F16}) {
      const Tensor narrow = to(w, type);
      if (sum(abs(to(narrow, DType::F32) - w)).item<float>() != 0.0f) continue;
      linear->weight = narrow;
      break;
    }
  }
}

void quantize_activations(Block& b, const ActivationQuant& s) {
  for (auto& [name, linear] : b.linears()) linear->input_quant = s.linear;
  Attention::Taps& taps = b.taps();
  taps.q = s.q, taps.k = s.k, taps.v = s.v, taps.p = s.p;
}

}  // namespace omq::nn
