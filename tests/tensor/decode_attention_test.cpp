// Attention of one token over a cache of floats or codes: what the general kernel gives, the same
// on any number of threads.
#include "tensor/decode_attention.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <optional>

#include "tensor/kernels.h"
#include "tensor/parallel.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq {
namespace {

struct Threads {  // for one scope
  explicit Threads(int n) : before(num_threads()) { set_num_threads(n); }
  ~Threads() { set_num_threads(before); }
  int before;
};

struct Cache {
  Tensor floats;  // what attention sees
  Tensor stored;  // undefined when they are codes
  QuantizedRows codes;

  Cache(Rng& rng, int64_t capacity, int64_t heads, int64_t d, const std::optional<RowQuant>& s,
        int64_t batch = 1, DType dtype = DType::F32)
      : floats(normal_tensor(rng, {batch, capacity, heads, d}, DType::F32)) {
    if (!s) {
      stored = Tensor::empty(floats.shape(), dtype);
      cpu::copy(stored, floats);
      cpu::copy(floats, stored);
      return;
    }
    codes.spec = *s;
    codes.cols = d;
    codes.paired = s->bits <= 4;
    codes.codes = Tensor::zeros({batch, capacity, heads, codes.code_bytes()}, DType::U8);
    codes.grid = Tensor::zeros({batch, capacity, heads, 2});
    cpu::quantize_rows(codes, floats);
    cpu::dequantize_rows(floats, codes);
  }
  CachedRows rows() const { return {stored, codes}; }
  Cache sequence(int64_t i) const {
    const auto part = [i](const Tensor& t) {
      if (!t.defined()) return Tensor{};
      return t.alias({1, t.dim(1), t.dim(2), t.dim(3)}, t.strides(), i * t.stride(0));
    };
    Cache one = *this;
    one.stored = part(stored);
    one.codes.codes = part(codes.codes), one.codes.grid = part(codes.grid);
    return one;
  }
};

Tensor first(const Tensor& t, int64_t n) {
  return t.alias({1, n, t.dim(2), t.dim(3)}, t.strides());
}

}  // namespace

TEST_CASE("decode attention: grouped heads, floats, halves and codes, short and long") {
  Rng rng(3);
  const std::pair<std::optional<RowQuant>, DType> kinds[] = {
      {std::nullopt, DType::F32},
      {std::nullopt, DType::F16},
      {RowQuant{.bits = 8}, {}},
      {RowQuant{.bits = 4}, {}},
      {RowQuant{.bits = 3, .include_zero = false}, {}}};
  for (const auto& [heads, kv_heads, d] :
       {std::array<int64_t, 3>{9, 3, 64}, {4, 4, 20}, {6, 1, 33}})
    for (const auto& [kind, floats] : kinds) {
      const int64_t capacity = 1000;
      const Cache k(rng, capacity, kv_heads, d, kind, 1, floats),
          v(rng, capacity, kv_heads, d, kind, 1, floats);
      DecodeAttention attention(heads, kv_heads, d, capacity);
      for (const int64_t n : {1, 2, 63, 64, 65, 256, 257, 700, 1000}) {
        CAPTURE(heads);
        CAPTURE(n);
        const Tensor q = normal_tensor(rng, {1, 1, heads, d}, DType::F32, 3);
        Tensor want = Tensor::empty(q.shape(), DType::F32);
        Tensor lse = Tensor::empty({1, heads, 1}, DType::F32);
        cpu::attention(want, lse, q, first(k.floats, n), first(v.floats, n),
                       {.scale = 1 / std::sqrt(static_cast<double>(d)), .causal = true});
        Tensor one = Tensor::full(q.shape(), 77.0);
        {
          const Threads scope(1);
          attention(q.data<float>(), k.rows(), v.rows(), n, one.data<float>());
        }
        CHECK(close(one, want, n <= 256 ? 1e-14 : 1e-11));
        const Threads scope(3);
        Tensor three = Tensor::full(q.shape(), 77.0);
        attention(q.data<float>(), k.rows(), v.rows(), n, three.data<float>());
        CHECK(bit_equal(three, one));
      }
    }
}

TEST_CASE("decode attention: sequences together are each alone") {
  Rng rng(7);
  constexpr int64_t kHeads = 6, kKvHeads = 2, kDim = 20, kCapacity = 700, kBatch = 3;
  for (const auto& kind : {std::optional<RowQuant>{}, std::optional(RowQuant{.bits = 8}),
                           std::optional(RowQuant{.bits = 4})}) {
    const Cache k(rng, kCapacity, kKvHeads, kDim, kind, kBatch),
        v(rng, kCapacity, kKvHeads, kDim, kind, kBatch);
    DecodeAttention together(kHeads, kKvHeads, kDim, kCapacity, kBatch),
        alone(kHeads, kKvHeads, kDim, kCapacity);
    for (const int64_t n : {1, 65, 257, 700}) {
      CAPTURE(n);
      const Tensor q = normal_tensor(rng, {kBatch, kHeads, kDim}, DType::F32, 3);
      Tensor got = Tensor::full(q.shape(), 77.0), want = Tensor::full(q.shape(), 55.0);
      const Threads scope(2);
      together(q.data<float>(), k.rows(), v.rows(), n, got.data<float>());
      for (int64_t i = 0; i < kBatch; ++i) {
        const Cache own_k = k.sequence(i), own_v = v.sequence(i);
        const int64_t at = i * kHeads * kDim;
        alone(q.data<float>() + at, own_k.rows(), own_v.rows(), n, want.data<float>() + at);
      }
      CHECK(bit_equal(got, want));
    }
  }
}

TEST_CASE("decode attention: large scores stay finite, and NaN shows") {
  Rng rng(4);
  const Cache k(rng, 300, 2, 16, std::nullopt), v(rng, 300, 2, 16, std::nullopt);
  DecodeAttention attention(4, 2, 16, 300);
  Tensor q = normal_tensor(rng, {1, 1, 4, 16}, DType::F32, 1e4), y = Tensor::zeros({4, 16});
  attention(q.data<float>(), k.rows(), v.rows(), 300, y.data<float>());
  for (const float x : y.to_vector<float>()) CHECK(std::isfinite(x));
  q.data<float>()[0] = std::nanf("");
  attention(q.data<float>(), k.rows(), v.rows(), 300, y.data<float>());
  CHECK(std::isnan(y.data<float>()[0]));
}

TEST_CASE("decode attention: what cannot be is refused") {
  CHECK_THROWS_AS(DecodeAttention(9, 2, 64, 10), Error);
  DecodeAttention attention(2, 1, 4, 10);
  Rng rng(1);
  const Cache k(rng, 10, 1, 4, std::nullopt);
  float q[8] = {}, y[8];
  CHECK_THROWS_WITH_AS(attention(q, k.rows(), k.rows(), 0, y),
                       "decode attention: 0 tokens, room for 256", Error);
  DecodeAttention pair(2, 1, 4, 10, 2);
  CHECK_THROWS_WITH_AS(pair(q, k.rows(), k.rows(), 3, y),
                       "decode attention: 3 tokens of 2 sequences, the cache is [1, 10, 1, 4]",
                       Error);
}

}  // namespace omq
