// Compute: the type in which products multiply.
//
// Under a ComputeScope of 16 bits, matmul and linear round their F32 operands to it, sum in F32 and
// give F32 back; what their gradients need is kept rounded, and gradients are formed the same way.
// Everything else (norms, softmax, losses, learnables, optimiser) stays in F32. An op takes the
// type of the scope it is called in; its gradient remembers it.
#pragma once

#include "tensor/tensor.h"

namespace omq {

enum class Compute : uint8_t { F32, BF16, F16 };
const char* compute_name(Compute c);  // "f32", "bf16", "f16": as on command lines and in reports

// Of this thread, until the scope ends.
class [[nodiscard]] ComputeScope {
 public:
  explicit ComputeScope(Compute c);
  ~ComputeScope();
  ComputeScope(const ComputeScope&) = delete;
  ComputeScope& operator=(const ComputeScope&) = delete;

 private:
  Compute before_;
};

// The operand type of a product of tensors of type `stored`: the scope's for F32, else `stored`.
DType operand_dtype(DType stored);
// x in the type of the operands, without history.
Tensor rounded(const Tensor& x, DType type);

}  // namespace omq
