// What is quantised on its way through a block.
#include "nn/block.h"

namespace omq::nn {

void quantize_activations(Block& b, const ActivationQuant& s) {
  for (auto& [name, linear] : b.linears()) linear->input_quant = s.linear;
  b.taps() = {s.q, s.k, s.v, s.p};
}

}  // namespace omq::nn
