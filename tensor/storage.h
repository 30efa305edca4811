// Storage: a run of bytes on a device, shared by every Tensor that views it.
//
// Three ways to get one: allocate (aligned, through the device's allocator), map a piece of a file
// (read-only, zero copy), or borrow memory that somebody else keeps alive.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>

#include "tensor/device.h"

namespace omq {

class Storage {
 public:
  // Uninitialised bytes, 64-byte aligned on the CPU. Throws Error when memory runs out.
  static std::shared_ptr<Storage> allocate(size_t bytes, Device device);
  // Maps bytes [offset, offset + bytes) of a file read-only. Throws Error when the file is missing
  // or shorter.
  static std::shared_ptr<Storage> map(const std::filesystem::path& file, size_t offset,
                                      size_t bytes);
  // Views memory that keep_alive owns.
  static std::shared_ptr<Storage> borrow(void* data, size_t bytes, Device device,
                                         std::shared_ptr<void> keep_alive);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  Device device() const { return device_; }
  // Mapped files are read-only: writing kernels must not be given one.
  bool writable() const { return writable_; }

 private:
  Storage() = default;
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Device device_;
  bool writable_ = true;
  bool owned_ = false;                // allocated here: goes back to the device
  std::shared_ptr<void> keep_alive_;  // mapping or foreign owner
};

}  // namespace omq
