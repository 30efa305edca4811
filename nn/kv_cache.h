// KVCache: the keys and values of one block's past tokens, in memory that is allocated once; as
// F32 or F16, or as codes, each token's head on its own grid.
#pragma once

#include <optional>

#include "tensor/row_quant.h"
#include "tensor/tensor.h"

namespace omq::nn {

// How keys and values are kept; none: as floats. Up to 4 bits, two codes share a byte.
struct CacheQuant {
  std::optional<RowQuant> k, v;
  DType floats = DType::F32;  // or F16
  bool any() const { return k || v; }
  // Whether keys and values are both floats, or codes of which equally many share a byte.
  bool alike() const { return k && v ? paired(*k) == paired(*v) : !any(); }
  static bool paired(const RowQuant& s) { return s.bits <= 4; }
  // Of one token of one sequence, grids (8 bytes a head) included.
  int64_t token_bytes(int64_t kv_heads, int64_t head_dim) const;
};

class KVCache {
 public:
  // Room for `capacity` tokens of B sequences.
  KVCache(int64_t batch, int64_t capacity, int64_t kv_heads, int64_t head_dim, Device device = {},
          const CacheQuant& quant = {});

  // Writes k, v [B,T,K,d] behind what is stored. Throws Error when the cache is full.
  void append(const Tensor& k, const Tensor& v);
  struct View {
    Tensor k, v;  // [B, end − begin, K, d], F32; on a GPU of the ComputeScope's type
  };
  // Counts tokens that somebody has written into keys() and values() himself.
  void advance(int64_t tokens);
  // Tokens begin … end − 1: in place where they are stored in that type, made where they are not.
  View window(int64_t begin, int64_t end) const;
  const CacheQuant& quant() const { return quant_; }
  // Whether a window on the CPU, all in F32, is more memory than what is stored.
  bool is_compact() const;
  int64_t length() const { return length_; }
  int64_t capacity() const { return shape_[1]; }
  // A number that no other cache has, or had; of its copies, which share its memory, the same.
  uint64_t id() const { return id_; }
  // Grows with every change of what is stored: two readings are equal only if nothing happened
  // between them.
  uint64_t changes() const { return changes_; }
  // Forgets all tokens from position `length` on.
  void truncate(int64_t length);

  // Either floats or codes, of all the capacity.
  struct Store {
    Tensor floats;  // F32 or F16 [B, capacity, K, d]
    QuantizedRows codes;
    Store(const Shape& shape, Device device, const std::optional<RowQuant>& s, DType dtype);
    void write(int64_t at, const Tensor& x);
    Tensor read(int64_t begin, int64_t end) const;
    const Tensor& memory() const { return floats.defined() ? floats : codes.codes; }
  };
  // As stored, for readers that take tokens one by one.
  const Store& keys() const { return k_; }
  const Store& values() const { return v_; }
  int64_t batch() const { return shape_[0]; }

 private:
  Shape shape_;  // [B, capacity, K, d]
  CacheQuant quant_;
  Store k_, v_;
  int64_t length_ = 0;
  uint64_t id_, changes_ = 0;
};

}  // namespace omq::nn
