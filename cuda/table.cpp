// The CUDA kernel tables, from the same list as the CPU's.
#include "tensor/kernels.h"

namespace omq {

const DenseKernels* cuda_kernels() {
#define OMQ_KERNEL(name, params) .name = cuda::name,
#define OMQ_PACKED_KERNEL(name, params)
  static const DenseKernels table{
#include "tensor/kernels.def"
  };
#undef OMQ_KERNEL
#undef OMQ_PACKED_KERNEL
  return &table;
}

const PackedKernels* cuda_packed_kernels() {
#define OMQ_KERNEL(name, params)
#define OMQ_PACKED_KERNEL(name, params) .name = cuda::name,
  static const PackedKernels table{
#include "tensor/kernels.def"
  };
#undef OMQ_KERNEL
#undef OMQ_PACKED_KERNEL
  return &table;
}

}  // namespace omq
