// The block formats of GGUF tensors and how each becomes F32.
//
// A row of a tensor is a whole number of blocks; a block holds a fixed number of values in a fixed
// number of bytes. One table row per type: the reader needs the sizes of all of them to check a
// file, the decoder only of those that occur in LLaMA-family files. Reference:
// spec/interop-formats.md §5, "Tensor types and blocks".
#pragma once

#include <cstdint>
#include <span>

#include "tensor/tensor.h"

namespace omq {

// Type numbers that code refers to by name.
inline constexpr uint32_t kGgmlF32 = 0, kGgmlF16 = 1;

struct GgmlType {
  uint32_t id;
  const char* name;
  int64_t values;  // in a block
  int64_t bytes;   // of a block
  // Decodes `blocks` blocks that lie one after the other; null: this type is not decoded here.
  void (*decode)(const uint8_t* from, float* to, int64_t blocks);
};

// Null for an unknown number.
const GgmlType* find_ggml_type(uint32_t id);

// bytes: [rows, values of a row] in blocks → F32, in parallel. `values` must be whole blocks and
// type.decode not null.
void ggml_to_f32(const GgmlType& type, std::span<const uint8_t> bytes, float* to, int64_t values);

}  // namespace omq
