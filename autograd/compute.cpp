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

DType product_dtype(const Tensor& x) {
  return x.device().type == DeviceType::CPU ? x.dtype() : operand_dtype(x.dtype());
}

DType wide_dtype(DType type) { return type == DType::F64 ? DType::F64 : DType::F32; }

DType gradient_dtype(const Tensor& x) {
  const bool narrow = x.dtype() == DType::BF16 && x.device().type != DeviceType::CPU;
  return narrow ? DType::BF16 : wide_dtype(x.dtype());
}

DType operand_dtype(DType stored) {
  if (stored != DType::F32 || current == Compute::F32) return stored;
  return current == Compute::BF16 ? DType::BF16 : DType::F16;
}

}  // namespace omq
