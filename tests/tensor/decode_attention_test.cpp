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

  Cache(Rng& rng, int64_t capacity, int64_t heads, int64_t d, const std::optional<RowQuant>& s)
      : floats(normal_tensor(rng, {1, capacity, heads, d}, DType::F32)) {
    if (!s) {
      stored = floats;
      return;
    }
    codes.spec = *s;
    codes.cols = d;
    codes.paired = s->bits <= 4;
    codes.codes = Tensor::zeros({1, capacity, heads, codes.code_bytes()}, DType::U8);
    codes.grid = Tensor::zeros({1, capacity, heads, 2});
    cpu::quantize_rows(codes, floats);
    cpu::dequantize_rows(floats, codes);
  }
  CachedRows rows() const { return {stored, codes}; }
};

Tensor first(const Tensor& t, int64_t n) {
  return t.alias({1, n, t.dim(2), t.dim(3)}, t.strides());
}

}  // namespace

TEST_CASE("decode attention: grouped heads, floats and codes, short and long") {
  Rng rng(3);
  const std::optional<RowQuant> kinds[] = {std::nullopt, RowQuant{.bits = 8}, RowQuant{.bits = 4},
                                           RowQuant{.bits = 3, .include_zero = false}};
  for (const auto& [heads, kv_heads, d] :
       {std::array<int64_t, 3>{9, 3, 64}, {4, 4, 20}, {6, 1, 33}})
    for (const auto& kind : kinds) {
      const int64_t capacity = 1000;
      const Cache k(rng, capacity, kv_heads, d, kind), v(rng, capacity, kv_heads, d, kind);
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
}

}  // namespace omq
