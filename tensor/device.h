// Device: where bytes live, and the table of functions that a device offers.
//
// A DeviceApi is a plain struct of function pointers (no virtual classes, no registry): device.cpp
// holds the CPU's, cuda/device.cpp the GPU's. A build without CUDA links cuda/absent.cpp, whose
// table pointer is null, and every attempt to use such a device ends in one clear error. See
// kernels.h for the compute tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace omq {

enum class DeviceType : uint8_t { CPU, CUDA };

struct Device {
  DeviceType type = DeviceType::CPU;
  int8_t index = 0;
  bool operator==(const Device&) const = default;
};

// "cpu", "cuda:0".
std::string to_string(Device d);
// "cpu", "cuda".
std::string to_string(DeviceType t);

// Bytes now and at most held by live tensors, and the most that was taken from the system to hold
// them (0: not known).
struct MemoryUse {
  size_t now = 0, peak = 0, reserved_peak = 0;
};

// Memory functions of one device kind; sizes in bytes. alloc returns 64-byte aligned memory or
// throws Error. copy takes any pair of devices and may be given page-locked host memory; when it
// returns, host memory holds the bytes, or may be written again.
struct DeviceApi {
  void* (*alloc)(size_t bytes, int index);
  void (*free)(void* p, size_t bytes, int index);
  void (*copy)(void* dst, Device dst_device, const void* src, Device src_device, size_t bytes);
  void (*sync)(int index);
  MemoryUse (*memory)(int index);
  void (*reset_memory_peak)(int index);  // the peak starts again from the present
  // Runs body, maybe twice, recording what it asks of the device instead of doing it; null when
  // this device cannot record, and then body did not run. What was recorded is done by replay, any
  // number of times, in order with all other work, and given back by forget. See
  // tensor/step_graph.h.
  void* (*record)(const std::function<void()>& body, int index);
  void (*replay)(void* recorded, int index);
  void (*forget)(void* recorded, int index);
  // Host memory that copy_ahead reads beside the device's work (page-locked for a GPU). Throws
  // Error when there is none left.
  void* (*alloc_pinned)(size_t bytes, int index);
  void (*free_pinned)(void* p, size_t bytes, int index);
  // Begins to copy pinned host memory to the device once all work asked for so far is done, and
  // beside what is asked for next; later work may use it after join_ahead. src must not change
  // until then.
  void (*copy_ahead)(void* dst, const void* src, size_t bytes, int index);
  void (*join_ahead)(int index);
  // Bytes that tensors may take: what the device has free or they hold already, less where a limit
  // was set. 0: not known. Beyond a limit alloc throws Error; devices that cannot count ignore it.
  size_t (*memory_limit)(int index);
  void (*set_memory_limit)(size_t bytes, int index);
  // on: kernels keep to what the smallest supported device can do (cuda: compute capability 8.6,
  // 99 KiB of shared memory), for tests and comparisons on a larger one. Not while work is under
  // way; recordings stay as they are.
  void (*set_plain_path)(bool on, int index);
  std::string (*describe)(int index);  // "NVIDIA H100 80GB HBM3, 79.1 GiB"
};

// Throws Error when this build has no back end for d.
const DeviceApi& device_api(Device d);

// The CUDA memory table, or null in a build without CUDA (defined in cuda/: device.cpp or
// absent.cpp).
const DeviceApi* cuda_device_api();

// The CPU's entries of its table, by name.
MemoryUse cpu_memory_use();
void reset_cpu_memory_peak();

}  // namespace omq
