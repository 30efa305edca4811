// The compute type of the calling thread.
#include "autograd/compute.h"

#include "tensor/kernels.h"

namespace omq {
namespace {

thread_local Compute current = Compute::F32;

}  // namespace

const char* compute_name(Compute c) {
  return c == Compute::F32 ? "f32" : c == Compute::BF16 ? "bf16" : "f16";
}

ComputeScope::ComputeScope(Compute c) : before_(current) { current = c; }
ComputeScope::~ComputeScope() { current = before_; }

Tensor rounded(const Tensor& x, DType type) {
  if (x.dtype() == type) return x.detach();
  Tensor y = Tensor::empty(x.shape(), type, x.device());
  on(x).copy(y, x);
  return y;
}

DType operand_dtype(DType stored) {
  if (stored != DType::F32 || current == Compute::F32) return stored;
  return current == Compute::BF16 ? DType::BF16 : DType::F16;
}

}  // namespace omq
