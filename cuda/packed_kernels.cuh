// What the kernels over packed weights share: the choice of a compiled kernel by bits and unit, and
// launches that may begin before the kernel in front of them has ended.
#pragma once

#include "cuda/common.cuh"
#include "cuda/packed_layout.cuh"
#include "cuda/ptx.cuh"

namespace omq::cuda {

// w, arranged and on a device. Throws Error when it is not.
inline PackedView view_of(const char* op, const PackedInt& w) {
  check(w.data.device().type == DeviceType::CUDA && w.data.is_contiguous() && unit_of(w) > 0,
        "{}: packed weights [{}, {}] are not in the order of a GPU", op, w.rows, w.cols);
  const PackedView v = packed_view(w, w.data.data<uint8_t>());
  check(w.data.numel() == packed_bytes(v), "{}: packed weights [{}, {}] of {} bytes, {} wanted", op,
        w.rows, w.cols, w.data.numel(), packed_bytes(v));
  return v;
}

// Calls body(Int<bits>, Int<unit>) for the layout of v.
template <class F> void with_layout(const PackedView& v, F&& body) {
  const auto of_unit = [&](auto bits) {
    if (v.unit == 128) return body(bits, Int<128>{});
    if (v.unit == 64) return body(bits, Int<64>{});
    return body(bits, Int<32>{});
  };
  if (v.bits == 8) return of_unit(Int<8>{});
  if (v.bits == 4) return of_unit(Int<4>{});
  if (v.bits == 3) return of_unit(Int<3>{});
  return of_unit(Int<2>{});
}

// a / b for 0 ≤ a < 2³¹ / b and inverse = inverse_of(b): one multiplication.
inline uint32_t inverse_of(int b) {
  return b == 1 ? 0 : static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<uint64_t>(b) + 1);
}
__device__ __forceinline__ int quotient(int a, uint32_t inverse) {
  return inverse == 0 ? a : static_cast<int>(__umulhi(static_cast<uint32_t>(a), inverse));
}

// ---- chained launches ----
//
// A chained kernel may be started while the one before it on the stream still runs (programmatic
// dependent launch, from compute capability 9.0 on). It lets its own successor start at once, reads
// what no kernel writes (weights), and then waits until everything before it has ended.

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// cluster: blocks in y that form one (1: none; more: on devices of 9.0 and newer).
template <class... Params, class... Args>
void launch_chained(const char* op, const Tensor& where, void (*kernel)(Params...), dim3 grid,
                    int threads, size_t shared, int cluster, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const cudaStream_t stream = stream_of(where);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {1, static_cast<unsigned>(cluster), 1};
  config.attrs = attributes;
  config.numAttrs = device_info(where.device().index).major < 9 ? 0 : cluster > 1 ? 2 : 1;
  begin_launch(stream);
  OMQ_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
  check_launch(op, stream);
}

// Lets `kernel` ask for `bytes` of shared memory beside what it declares; and gives it the same
// division of a processor's memory between cache and shared as its neighbours have: changing that
// from kernel to kernel would make each wait for the other's end.
template <class K> void prepare_shared(K kernel, size_t bytes) {
  const void* f = reinterpret_cast<const void*>(kernel);
  OMQ_CUDA(cudaFuncSetAttribute(f, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared));
  constexpr size_t kAlways = 40 * 1024;  // every block may have so much
  if (bytes > kAlways)
    OMQ_CUDA(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)));
}

}  // namespace omq::cuda
