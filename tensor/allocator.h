// Allocator: where a program that embeds the library wants the memory of tensors to come from.
#pragma once

#include <cstddef>

namespace omq {

struct Allocator {
  // `alignment` is a power of two; null when there is no memory.
  void* (*alloc)(void* user, size_t bytes, size_t alignment) = nullptr;
  void (*free)(void* user, void* memory, size_t bytes) = nullptr;
  void* user = nullptr;
};

// While one lives, CPU tensors that this thread makes come from there, and go back there whenever
// they die: the functions must outlive them. Without one, freed blocks are kept for the next
// request (tensor/device.cpp).
class [[nodiscard]] AllocatorScope {
 public:
  explicit AllocatorScope(const Allocator& allocator);
  ~AllocatorScope();
  AllocatorScope(const AllocatorScope&) = delete;
  AllocatorScope& operator=(const AllocatorScope&) = delete;

 private:
  const Allocator* before_;
};

}  // namespace omq
