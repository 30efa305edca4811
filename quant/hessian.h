// What rounders that solve look at: H = 2·Xᵀ·X / tokens of the inputs of a block's linears (spec
// weight-methods §10), over all calibration windows.
#pragma once

#include <functional>
#include <vector>

#include "nn/block.h"

namespace omq::quant {

// The stream that a block is committed on.
struct CommitData {
  Tensor x;                    // [N,T,D], what goes into the block; where blocks compute, or in
                               // host memory
  nn::Positions at;            // where blocks compute
  std::function<void()> poll;  // between windows; throws to end the run
};

// Linears that read the same tensor, as indices into Block::linears(), in the order of the forward:
// q, k, v | o | gate, up | down.
using Stages = std::vector<std::vector<size_t>>;
Stages stages_of(const nn::Block& block, const CommitData& data);

// H of what linear i of `block` is given on the whole stream: F32 [in, in], in host memory. With an
// activation quantiser the inputs are the quantised ones. Products of a window are F32 on the
// device, and so is their sum. block: in host memory.
Tensor hessian_of(const nn::Block& block, size_t i, const CommitData& data);

}  // namespace omq::quant
