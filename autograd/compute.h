// Compute: the type in which products multiply.
//
// Under a ComputeScope of 16 bits, matmul and linear round their F32 operands to it, sum in F32 and
// give F32 back; what their gradients need is kept rounded, and gradients are formed the same way.
// Everything else (norms, softmax, losses, learnables, optimiser) computes in F32; what a GPU's
// kernels write only to be multiplied they write in the operands' type at once. An op takes the
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
// The type of a result that is made to be multiplied: the operands' on a GPU; that of x on the CPU,
// whose kernels write what they read.
DType product_dtype(const Tensor& x);
// The type of sums, statistics and most gradients: F64 for F64, else F32.
DType wide_dtype(DType type);
// The type of a product's gradient in x: of BF16 tensors BF16, which has F32's range, where the
// device writes it; else wide.
DType gradient_dtype(const Tensor& x);
// x in the type of the operands, without history.
Tensor rounded(const Tensor& x, DType type);

}  // namespace omq
