// KVCache: the keys and values of one block's past tokens, in memory that is allocated once.
#pragma once

#include "tensor/tensor.h"

namespace omq::nn {

class KVCache {
 public:
  // Room for `capacity` tokens of B sequences: k and v F32 [B, capacity, K, d].
  KVCache(int64_t batch, int64_t capacity, int64_t kv_heads, int64_t head_dim, Device device = {});

  struct View {
    Tensor k, v;  // [B, S, K, d], the new tokens last
  };
  // Writes k, v [B,T,K,d] behind what is stored and returns everything stored. Throws Error when
  // the cache is full.
  View append(const Tensor& k, const Tensor& v);
  int64_t length() const { return length_; }
  int64_t capacity() const { return k_.dim(1); }
  // Forgets all tokens from position `length` on.
  void truncate(int64_t length);

 private:
  Tensor k_, v_;
  int64_t length_ = 0;
};

}  // namespace omq::nn
