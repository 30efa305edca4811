// The build without CUDA: there are no tables. Linked instead of cuda/*.cu.
#include "tensor/decode_kernels.h"
#include "tensor/kernels.h"

namespace omq {

const DenseKernels* cuda_kernels() { return nullptr; }
const PackedKernels* cuda_packed_kernels() { return nullptr; }
const DecodeKernels* cuda_decode_kernels() { return nullptr; }
const DeviceApi* cuda_device_api() { return nullptr; }

}  // namespace omq
