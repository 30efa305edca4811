// The CPU's kernel tables, and the choice of a table by device.
#include "tensor/kernels.h"

#include "tensor/decode_kernels.h"

namespace omq {

const DenseKernels& cpu_kernels() {
#define OMQ_KERNEL(name, params) .name = cpu::name,
#define OMQ_PACKED_KERNEL(name, params)
  static const DenseKernels table{
#include "tensor/kernels.def"
  };
#undef OMQ_KERNEL
#undef OMQ_PACKED_KERNEL
  return table;
}

const PackedKernels& cpu_packed_kernels() {
#define OMQ_KERNEL(name, params)
#define OMQ_PACKED_KERNEL(name, params) .name = cpu::name,
  static const PackedKernels table{
#include "tensor/kernels.def"
  };
#undef OMQ_KERNEL
#undef OMQ_PACKED_KERNEL
  return table;
}

namespace {
template <class Table> const Table& present(const Table* table, const Tensor& x) {
  check(table != nullptr,
        "tensor is on {} but this build has no CUDA back end; `make cuda` makes one that has",
        to_string(x.device()));
  return *table;
}
}  // namespace

const DenseKernels& on(const Tensor& x) {
  check(x.defined(), "kernel: undefined tensor");
  return x.device().type == DeviceType::CPU ? cpu_kernels() : present(cuda_kernels(), x);
}

const PackedKernels& packed_on(const Tensor& x) {
  check(x.defined(), "kernel: undefined tensor");
  if (x.device().type == DeviceType::CPU) return cpu_packed_kernels();
  return present(cuda_packed_kernels(), x);
}

const DecodeKernels* decode_kernels(Device d) {
  return d.type == DeviceType::CUDA ? cuda_decode_kernels() : nullptr;
}

}  // namespace omq
