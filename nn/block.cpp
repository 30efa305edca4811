// Blocks between devices, and what is quantised on its way through one.
#include "nn/block.h"

#include "autograd/ops.h"

namespace omq::nn {

void move_to(Block& block, Device device) {
  block.visit([&](std::string_view, Tensor& t) {
    if (t.defined() && t.device() != device) t = to(t, device);
  });
}

void quantize_activations(Block& b, const ActivationQuant& s) {
  for (auto& [name, linear] : b.linears()) linear->input_quant = s.linear;
  b.taps() = {s.q, s.k, s.v, s.p};
}

}  // namespace omq::nn
