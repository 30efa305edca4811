// The bytes of QuantizedRows as kernels see them: codes, or codes less an offset.
#pragma once

#include "cuda/common.cuh"
#include "tensor/row_quant.h"

namespace omq::cuda {

// Taking 128 from a code of 8 bits turns its top bit.
inline uint8_t turned_bit(const QuantizedRows& q) {
  return q.as_signed() ? static_cast<uint8_t>(signed_offset(q.spec.bits)) : uint8_t{0};
}
inline uint8_t* bytes_of(const QuantizedRows& q) {
  return q.as_signed() ? reinterpret_cast<uint8_t*>(q.codes.data<int8_t>())
                       : q.codes.data<uint8_t>();
}

struct CodeBytes {
  const uint8_t* bytes;
  uint8_t turned;
  explicit CodeBytes(const QuantizedRows& q) : bytes(bytes_of(q)), turned(turned_bit(q)) {}
  __device__ int operator[](int64_t i) const { return bytes[i] ^ turned; }
};

__device__ __forceinline__ int byte_sum(uint32_t signed_bytes, int before) {
  return __dp4a(static_cast<int>(signed_bytes), 0x01010101, before);
}

}  // namespace omq::cuda
