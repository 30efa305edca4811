// The key/value cache at every width: what is read is what the grid makes of what was written, and
// attention over windows of it is attention over all of it.
#include "nn/kv_cache.h"

#include <doctest/doctest.h>

#include "autograd/ops.h"
#include "nn/attention.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq::nn {
namespace {

using Quant = std::optional<RowQuant>;

Quant bits(int n) {
  if (n == 32) return std::nullopt;
  return RowQuant{.bits = n};
}

Tensor on_grid(const Tensor& x, const Quant& s) { return s ? fake_quant_rows(x, *s) : x; }

}  // namespace

TEST_CASE("a cache gives back what its grid makes of keys and values") {
  Rng rng(1);
  for (int k_bits : {2, 3, 4, 5, 8, 32})
    for (int v_bits : {4, 8, 32})
      for (int64_t head_dim : {8, 9}) {
        CAPTURE(k_bits);
        CAPTURE(v_bits);
        CAPTURE(head_dim);
        const CacheQuant quant{bits(k_bits), bits(v_bits)};
        CHECK(quant.any() == (k_bits < 32 || v_bits < 32));
        KVCache cache(2, 10, 3, head_dim, {}, quant);
        const Tensor k = normal_tensor(rng, {2, 10, 3, head_dim}, DType::F32),
                     v = normal_tensor(rng, {2, 10, 3, head_dim}, DType::F32);
        for (const auto& [begin, end] : {std::pair{0, 4}, {4, 5}, {5, 10}})
          cache.append(slice(k, 1, begin, end), slice(v, 1, begin, end));
        const auto check_window = [&](int64_t begin, int64_t end, const Tensor& keys,
                                      const Tensor& values) {
          const KVCache::View got = cache.window(begin, end);
          CHECK(bit_equal(got.k, on_grid(slice(keys, 1, begin, end), quant.k)));
          CHECK(bit_equal(got.v, on_grid(slice(values, 1, begin, end), quant.v)));
        };
        check_window(0, 10, k, v);
        check_window(3, 7, k, v);
        // Cut, and gone on otherwise: nothing before the cut changes.
        cache.truncate(6);
        cache.append(slice(v, 1, 0, 2), slice(k, 1, 0, 2));
        CHECK(cache.length() == 8);
        check_window(0, 6, k, v);
        CHECK(bit_equal(cache.window(6, 8).k, on_grid(slice(v, 1, 0, 2), quant.k)));
        CHECK(bit_equal(cache.window(6, 8).v, on_grid(slice(k, 1, 0, 2), quant.v)));
      }
}

TEST_CASE("a cache of F16 gives back what F16 holds") {
  Rng rng(2);
  KVCache cache(2, 8, 3, 9, {}, {{}, {}, DType::F16});
  const Tensor k = normal_tensor(rng, {2, 5, 3, 9}, DType::F32),
               v = normal_tensor(rng, {2, 5, 3, 9}, DType::F32);
  cache.append(k, v);
  CHECK(cache.is_compact());
  CHECK(!cache.quant().any());
  CHECK(bit_equal(cache.window(1, 5).k, to(to(slice(k, 1, 1, 5), DType::F16), DType::F32)));
  CHECK(bit_equal(cache.window(0, 2).v, to(to(slice(v, 1, 0, 2), DType::F16), DType::F32)));
}

TEST_CASE("bytes of a token") {
  CHECK(CacheQuant{}.token_bytes(3, 64) == 3 * 2 * 64 * 4);
  CHECK(CacheQuant{bits(8), bits(6)}.token_bytes(3, 64) == 3 * 2 * (64 + 8));
  CHECK(CacheQuant{bits(4), bits(2)}.token_bytes(3, 64) == 3 * 2 * (32 + 8));
  CHECK(CacheQuant{bits(4), {}}.token_bytes(1, 9) == 5 + 8 + 36);
  CHECK(CacheQuant{{}, {}, DType::F16}.token_bytes(3, 64) == 3 * 2 * 64 * 2);
}

TEST_CASE("a cache of codes says when it is full and what does not fit") {
  KVCache cache(1, 4, 2, 8, {}, {bits(4), bits(8)});
  const Tensor three = Tensor::zeros({1, 3, 2, 8}), two = Tensor::zeros({1, 2, 2, 8});
  cache.append(three, three);
  CHECK_THROWS_WITH_AS(cache.append(two, two),
                       "context is full: 3 tokens cached, 2 more wanted, room for 4", Error);
  CHECK(cache.length() == 3);
  const Tensor wrong = Tensor::zeros({1, 1, 3, 8});
  CHECK_THROWS_WITH_AS(cache.append(wrong, wrong),
                       "kv cache [1, 4, 2, 8]: cannot append [1, 1, 3, 8]", Error);
  CHECK_THROWS_WITH_AS(cache.window(2, 4), "kv cache: no tokens 2…3 among 3", Error);
  CHECK_THROWS_WITH_AS(cache.truncate(4), "kv cache: cannot truncate 3 tokens to 4", Error);
}

TEST_CASE("attention over a long cache of codes, window by window, is attention over all of it") {
  NoGrad off;
  Rng rng(2);
  constexpr int64_t kTokens = 1300, kWidth = 16;
  const auto linear = [&](int64_t out, int64_t in) {
    return Linear{normal_tensor(rng, {out, in}, DType::F32, 0.5), {}};
  };
  Attention layer{.q_proj = linear(32, kWidth),
                  .k_proj = linear(16, kWidth),
                  .v_proj = linear(16, kWidth),
                  .o_proj = linear(kWidth, 32),
                  .q_norm = {},
                  .k_norm = {},
                  .heads = 4,
                  .kv_heads = 2,
                  .head_dim = 8,
                  .taps = {}};
  const RopeTables rope = rope_tables(rope_frequencies(8, 1e4, {}), kTokens);
  const Tensor x = normal_tensor(rng, {2, kTokens, kWidth}, DType::F32);
  for (const auto& [k, v] : {std::pair{4, 4}, {8, 32}, {32, 3}}) {
    CAPTURE(k);
    CAPTURE(v);
    layer.taps = {.q = bits(8), .k = bits(k), .v = bits(v), .p = {}};
    const Tensor whole = layer(x, positions(0, kTokens, rope), nullptr);
    KVCache cache(2, kTokens, 2, 8, {}, {layer.taps.k, layer.taps.v});
    int64_t begin = 0;
    for (const int64_t n : {700, 1, 500, 1, 97, 1}) {
      CAPTURE(begin);
      const Tensor y = layer(slice(x, 1, begin, begin + n), positions(begin, n, rope), &cache);
      CHECK(close(y, slice(whole, 1, begin, begin + n), 1e-11));
      begin += n;
    }
  }
}

}  // namespace omq::nn
