// Attention of one query token over a key/value cache, for decoding; or of one token of each of B
// sequences over its own.
//
// One task a sequence, key/value head and run of 256 keys: keys and values are read once for all
// query heads that share them; runs are joined in order by an online softmax (running maximum and
// sum, Milakov and Gimelshein 2018). So results do not depend on the number of threads, and a
// single run gives the general kernel's bits. Keys and values that are codes or F16 become F32 a
// few rows at a time. Memory is taken when the object is made. CPU only.
#pragma once

#include <cstdint>
#include <memory>

#include "tensor/row_quant.h"
#include "tensor/tensor.h"

namespace omq {

// Keys or values of B sequences: floats F32 or F16 [B, capacity, K, d], or, where that is
// undefined, codes of that shape.
struct CachedRows {
  const Tensor& floats;
  const QuantizedRows& codes;
};

class DecodeAttention {
 public:
  // heads: a multiple of kv_heads. capacity: the most tokens of a cache. batch: B.
  DecodeAttention(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity,
                  int64_t batch = 1);
  ~DecodeAttention();
  DecodeAttention(DecodeAttention&&) noexcept;

  // y [B, H, d] = softmax(q kᵀ / √d) v over tokens 0 … length − 1; q [B, H, d]. Not to be called by
  // two threads at once.
  void operator()(const float* q, const CachedRows& k, const CachedRows& v, int64_t length,
                  float* y);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace omq
