// What every CUDA file asks of the host side: the compute stream of a device, its properties, and
// the one place where an error of the CUDA runtime becomes an Error.
//
// One stream per device carries all kernels, copies and allocations, so program order is execution
// order and a freed block can be used again at once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "tensor/tensor.h"

namespace omq::cuda {

// What launches and plans depend on, read from the device once.
struct DeviceInfo {
  int index = 0;
  int major = 0, minor = 0;  // compute capability, or what the kernels were compiled for
  int sms = 0;
  size_t l2_bytes = 0;
  size_t shared_optin = 0;  // bytes of shared memory that a block may ask for
};

// Makes x's device the current one of this thread. Throws Error when there is no such device, when
// the driver is too old, or when the device is older than this build's oldest architecture.
const DeviceInfo& device_info(int index);
cudaStream_t stream_of(int index);
// What this thread's current device runs was compiled for: 10 · major + minor. (copy.cu)
int compiled_for();
inline cudaStream_t stream_of(const Tensor& x) { return stream_of(x.device().index); }

// Throws Error with the call, where it stands and the runtime's text, unless status is success.
void check_status(cudaError_t status, const char* call, const char* file, int line);
#define OMQ_CUDA(call) ::omq::cuda::check_status((call), #call, __FILE__, __LINE__)

// To be called before and after every launch (or group of launches under one name). Afterwards it
// throws what the launch reported; with OMQ_SYNC=1 in the environment it also waits for the kernel,
// so that an error names the one that caused it. With OMQ_PROFILE=1 every launch is timed on its
// own, and the program prints the sums by name on stderr when it ends; both switch recording off.
void begin_launch(cudaStream_t stream);
void check_launch(const char* op, cudaStream_t stream);

}  // namespace omq::cuda
