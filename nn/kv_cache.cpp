// KVCache: append is one of the three in-place writers of the library.
#include "nn/kv_cache.h"

#include <atomic>

#include "autograd/compute.h"
#include "autograd/ops.h"
#include "nn/linear_input.h"

namespace omq::nn {
namespace {

// Tokens begin … end − 1 of t [B, capacity, …].
Tensor tokens(const Tensor& t, int64_t begin, int64_t end) {
  Shape shape = t.shape();
  shape[1] = end - begin;
  return t.alias(shape, t.strides(), begin * t.stride(1));
}

QuantizedRows tokens(QuantizedRows q, int64_t begin, int64_t end) {
  q.codes = tokens(q.codes, begin, end);
  q.grid = tokens(q.grid, begin, end);
  return q;
}

QuantizedRows described(RowQuant s, int64_t cols) {
  QuantizedRows q;
  q.spec = s;
  q.cols = cols;
  q.paired = CacheQuant::paired(s);
  return q;
}

}  // namespace

int64_t CacheQuant::token_bytes(int64_t kv_heads, int64_t head_dim) const {
  const auto bytes = [&](const std::optional<RowQuant>& s) {
    return s ? described(*s, head_dim).code_bytes() + 8
             : static_cast<int64_t>(dtype_size(floats)) * head_dim;
  };
  return kv_heads * (bytes(k) + bytes(v));
}

KVCache::Store::Store(const Shape& shape, Device device, const std::optional<RowQuant>& s,
                      DType dtype) {
  if (!s) {
    floats = Tensor::empty(shape, dtype, device);
    return;
  }
  codes = described(*s, shape.back());
  Shape bytes = shape, grid = shape;
  bytes[bytes.n - 1] = codes.code_bytes();
  grid[grid.n - 1] = 2;
  codes.codes = Tensor::empty(bytes, DType::U8, device);
  codes.grid = Tensor::empty(grid, DType::F32, device);
}

void KVCache::Store::write(int64_t at, const Tensor& x) {
  const int64_t end = at + x.dim(1);
  if (floats.defined()) {
    Tensor window = tokens(floats, at, end);
    on(x).copy(window, x);
  } else {
    QuantizedRows window = tokens(codes, at, end);
    packed_on(x).quantize_rows(window, contiguous(x));
  }
}

Tensor KVCache::Store::read(int64_t begin, int64_t end) const {
  const bool device = memory().device().type != DeviceType::CPU;
  const DType wanted = device ? operand_dtype(DType::F32) : DType::F32;
  return floats.defined() ? to(tokens(floats, begin, end), wanted)
                          : dequantized(tokens(codes, begin, end), wanted);
}

namespace {

uint64_t next_id() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

}  // namespace

KVCache::KVCache(int64_t batch, int64_t capacity, int64_t kv_heads, int64_t head_dim, Device device,
                 const CacheQuant& quant)
    : shape_{batch, capacity, kv_heads, head_dim},
      quant_(quant),
      k_(shape_, device, quant.k, quant.floats),
      v_(shape_, device, quant.v, quant.floats),
      id_(next_id()) {}

bool KVCache::is_compact() const {
  return k_.memory().device().type == DeviceType::CPU &&
         (quant_.any() || quant_.floats != DType::F32);
}

void KVCache::append(const Tensor& k, const Tensor& v) {
  const int64_t added = k.dim(1);
  check(k.shape() == v.shape(), "kv cache: keys {} and values {} differ", k.shape(), v.shape());
  check(k.dim(0) == shape_[0] && k.dim(2) == shape_[2] && k.dim(3) == shape_[3],
        "kv cache {}: cannot append {}", shape_, k.shape());
  check(length_ + added <= capacity(),
        "context is full: {} tokens cached, {} more wanted, room for {}", length_, added,
        capacity());
  k_.write(length_, k);
  v_.write(length_, v);
  length_ += added;
  ++changes_;
}

void KVCache::advance(int64_t tokens) {
  check(tokens >= 0 && length_ + tokens <= capacity(), "kv cache: {} tokens behind {} of {}",
        tokens, length_, capacity());
  length_ += tokens;
  ++changes_;
}

KVCache::View KVCache::window(int64_t begin, int64_t end) const {
  check(begin >= 0 && begin <= end && end <= length_, "kv cache: no tokens {}…{} among {}", begin,
        end - 1, length_);
  return {k_.read(begin, end), v_.read(begin, end)};
}

void KVCache::truncate(int64_t length) {
  check(length >= 0 && length <= length_, "kv cache: cannot truncate {} tokens to {}", length_,
        length);
  length_ = length;
  ++changes_;
}

}  // namespace omq::nn
