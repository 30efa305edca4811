// The compute type of the calling thread.
#include "autograd/compute.h"

namespace omq {
namespace {

thread_local Compute current = Compute::F32;

}  // namespace

ComputeScope::ComputeScope(Compute c) : before_(current) { current = c; }
ComputeScope::~ComputeScope() { current = before_; }

DType operand_dtype(DType stored) {
  if (stored != DType::F32 || current == Compute::F32) return stored;
  return current == Compute::BF16 ? DType::BF16 : DType::F16;
}

}  // namespace omq
