// Activation quantisers: where the signals of a block are put on their grids (spec omniquant §5).
#pragma once

#include "nn/block.h"
#include "quant/spec.h"

namespace omq::quant {

// From now on `b` quantises, dynamically and differentiably, what spec.activations() says: the
// inputs of all its linears per token; q, k and v after the rotation per token and head; the
// probabilities per query. Where bits are 16 nothing is added.
void quantize_activations(nn::Block& b, const QuantSpec& spec);

}  // namespace omq::quant
