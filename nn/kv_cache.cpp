// KVCache: append is one of the three in-place writers of the library.
#include "nn/kv_cache.h"

#include "tensor/kernels.h"

namespace omq::nn {

KVCache::KVCache(int64_t batch, int64_t capacity, int64_t kv_heads, int64_t head_dim, Device device)
    : k_(Tensor::empty({batch, capacity, kv_heads, head_dim}, DType::F32, device)),
      v_(empty_like(k_)) {}

KVCache::View KVCache::append(const Tensor& k, const Tensor& v) {
  const int64_t tokens = k.dim(1);
  check(k.shape() == v.shape(), "kv cache: keys {} and values {} differ", k.shape(), v.shape());
  check(k.dim(0) == k_.dim(0) && k.dim(2) == k_.dim(2) && k.dim(3) == k_.dim(3),
        "kv cache {}: cannot append {}", k_.shape(), k.shape());
  check(length_ + tokens <= capacity(),
        "context is full: {} tokens cached, {} more wanted, room for {}", length_, tokens,
        capacity());
  auto store = [&](Tensor& cache, const Tensor& x) {
    Tensor window = cache.alias(x.shape(), cache.strides(), length_ * cache.stride(1));
    on(x).copy(window, x);
  };
  store(k_, k);
  store(v_, v);
  length_ += tokens;
  Shape shape = k_.shape();
  shape[1] = length_;
  return {k_.alias(shape, k_.strides()), v_.alias(shape, v_.strides())};
}

void KVCache::truncate(int64_t length) {
  check(length >= 0 && length <= length_, "kv cache: cannot truncate {} tokens to {}", length_,
        length);
  length_ = length;
}

}  // namespace omq::nn
