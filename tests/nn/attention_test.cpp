// The attention layer: with a cache, token by token, it gives what the whole sequence gives; and
// what cache and positions refuse.
#include "nn/attention.h"

#include <doctest/doctest.h>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/gradcheck.h"

namespace omq::nn {
namespace {

struct Sizes {
  int64_t D = 24, heads = 4, kv_heads = 2, head_dim = 8;
  bool bias = false, norms = false;
};

Attention make(const Sizes& z, Rng& rng, DType dtype, Device device) {
  const auto linear = [&](int64_t out, int64_t in) {
    const double deviation = 1 / std::sqrt(static_cast<double>(in));
    return Linear{converted(normal_tensor(rng, {out, in}, DType::F64, deviation), dtype, device),
                  z.bias ? converted(normal_tensor(rng, {out}), dtype, device) : Tensor{},
                  {}};
  };
  Attention a;
  a.q_proj = linear(z.heads * z.head_dim, z.D);
  a.k_proj = linear(z.kv_heads * z.head_dim, z.D);
  a.v_proj = linear(z.kv_heads * z.head_dim, z.D);
  a.o_proj = linear(z.D, z.heads * z.head_dim);
  if (z.norms) {
    a.q_norm = RMSNorm{
        converted(random_tensor(rng, {z.head_dim}, DType::F64, 0.5, 2), dtype, device), {}, 1e-6};
    a.k_norm = RMSNorm{
        converted(random_tensor(rng, {z.head_dim}, DType::F64, 0.5, 2), dtype, device), {}, 1e-6};
  }
  a.heads = z.heads, a.kv_heads = z.kv_heads, a.head_dim = z.head_dim;
  return a;
}

RopeTables tables(const Sizes& z, DType dtype, Device device) {
  const RopeTables t = rope_tables(rope_frequencies(z.head_dim, 1e4, {}), 64, dtype);
  return {converted(t.cos, dtype, device), converted(t.sin, dtype, device)};
}

Positions at(int64_t first, int64_t count, const RopeTables& t) {
  Positions p = positions(first, count, t);
  p.index = to(p.index, t.cos.device());
  return p;
}

const std::vector<Sizes> kSizes = {{24, 4, 2, 8}, {24, 3, 3, 8, true}, {24, 4, 1, 10, false, true}};

}  // namespace

TEST_CASE("with a cache, pieces of a sequence give what the whole gives") {
  for (Device d : test_devices())
    for (const Sizes& z : kSizes) {
      CAPTURE(d);
      CAPTURE(z.heads);
      Rng rng(1);
      const Attention layer = make(z, rng, DType::F32, d);
      const RopeTables rope = tables(z, DType::F32, d);
      const Tensor x = converted(normal_tensor(rng, {2, 20, z.D}), DType::F32, d);
      const Tensor whole = layer(x, at(0, 20, rope), nullptr);
      for (const std::vector<int64_t>& pieces :
           {std::vector<int64_t>(20, 1), {20}, {9, 1, 1, 9}, {1, 12, 7}}) {
        KVCache cache(2, 20, z.kv_heads, z.head_dim, d);
        int64_t begin = 0;
        for (int64_t n : pieces) {
          const Tensor y = layer(slice(x, 1, begin, begin + n), at(begin, n, rope), &cache);
          CHECK(close(y, slice(whole, 1, begin, begin + n), 1e-11));
          begin += n;
          CHECK(cache.length() == begin);
        }
      }
    }
}

namespace {

// The layer's formula in plain ops, with every tap.
Tensor by_hand(const Attention& a, const Tensor& x, const Positions& p) {
  const auto quant = [](const Tensor& t, const std::optional<RowQuant>& s) {
    return s ? fake_quant_rows(t, *s) : t;
  };
  const auto project = [&](const Linear& l, int64_t heads) {
    return reshape(omq::linear(x, l.dense(), l.bias), {x.dim(0), x.dim(1), heads, a.head_dim});
  };
  const auto turn = [&](const Tensor& t) { return rope(t, p.tables.cos, p.tables.sin, p.index); };
  const Tensor q = quant(turn(project(a.q_proj, a.heads)), a.taps.q);
  const Tensor k = quant(turn(project(a.k_proj, a.kv_heads)), a.taps.k);
  const Tensor v = quant(project(a.v_proj, a.kv_heads), a.taps.v);
  const AttentionSpec s{.scale = 1 / std::sqrt(static_cast<double>(a.head_dim))};
  const Tensor y =
      attention_composed(q, k, v, s, [&](const Tensor& t) { return quant(t, a.taps.p); });
  return omq::linear(reshape(y, {x.dim(0), x.dim(1), -1}), a.o_proj.dense());
}

}  // namespace

TEST_CASE("taps quantise queries, keys, values and probabilities, whole or piece by piece") {
  const Sizes z;
  Rng rng(6);
  const Attention plain = make(z, rng, DType::F32, {});
  const RopeTables rope = tables(z, DType::F32, {});
  const Tensor x = normal_tensor(rng, {2, 7, z.D}, DType::F32);
  const Tensor exact = plain(x, at(0, 7, rope), nullptr);
  const auto bits = [](int n) -> std::optional<RowQuant> {
    if (n == 16) return std::nullopt;
    return RowQuant{.bits = n};
  };
  struct Bits {
    int q, k, v, p;
  };
  for (const Bits& b : {Bits{4, 16, 16, 16}, Bits{16, 4, 16, 16}, Bits{16, 16, 4, 16},
                        Bits{16, 16, 16, 4}, Bits{4, 5, 6, 16}, Bits{4, 5, 6, 8}}) {
    CAPTURE(b.q);
    CAPTURE(b.k);
    CAPTURE(b.v);
    CAPTURE(b.p);
    Attention layer = plain;
    layer.taps = {bits(b.q), bits(b.k), bits(b.v), bits(b.p)};
    const Tensor whole = layer(x, at(0, 7, rope), nullptr);
    CHECK(close(whole, by_hand(layer, x, at(0, 7, rope)), 1e-11));
    CHECK_FALSE(close(whole, exact, 1e-6));
    // A token's codes do not depend on its neighbours, nor on who puts keys and values on the grid.
    for (const CacheQuant& kept : {CacheQuant{}, CacheQuant{layer.taps.k, layer.taps.v}}) {
      KVCache cache(2, 7, z.kv_heads, z.head_dim, {}, kept);
      for (int64_t t = 0; t < 7; ++t)
        CHECK(close(layer(slice(x, 1, t, t + 1), at(t, 1, rope), &cache), slice(whole, 1, t, t + 1),
                    1e-10));
    }
  }
}

TEST_CASE("a truncated cache goes on as if the rest had never been") {
  const Sizes z;
  Rng rng(2);
  const Attention layer = make(z, rng, DType::F32, {});
  const RopeTables rope = tables(z, DType::F32, {});
  const Tensor x = normal_tensor(rng, {1, 10, z.D}, DType::F32);
  KVCache cache(1, 12, z.kv_heads, z.head_dim);
  layer(x, at(0, 10, rope), &cache);
  cache.truncate(4);
  CHECK(cache.length() == 4);
  const Tensor again = layer(slice(x, 1, 4, 10), at(4, 6, rope), &cache);
  CHECK(close(again, slice(layer(x, at(0, 10, rope), nullptr), 1, 4, 10), 1e-11));
}

TEST_CASE("F32 agrees with F64, and attention sees relative positions only") {
  for (const Sizes& z : kSizes) {
    Rng narrow_rng(3), wide_rng(3);
    const Attention narrow = make(z, narrow_rng, DType::F32, {}),
                    wide = make(z, wide_rng, DType::F64, {});
    const Tensor x = normal_tensor(wide_rng, {1, 12, z.D});
    const RopeTables rope = tables(z, DType::F64, {});
    const Tensor exact = wide(x, at(0, 12, rope), nullptr);
    CHECK(close(narrow(converted(x, DType::F32), at(0, 12, tables(z, DType::F32, {})), nullptr),
                exact, 1e-11));
    CHECK(close(wide(x, at(40, 12, rope), nullptr), exact, 1e-24));
  }
}

TEST_CASE("the layer's gradients agree with differences") {
  Sizes z{6, 4, 2, 4, true, true};
  Rng rng(4);
  const Attention layer = make(z, rng, DType::F64, {});
  const RopeTables rope = tables(z, DType::F64, {});
  const auto f = [&](const auto& in) {
    Attention a = layer;
    a.q_proj.weight = in[1];
    a.k_proj.weight = in[2];
    a.v_proj.weight = in[3];
    a.o_proj.weight = in[4];
    a.k_norm->weight = in[5];
    return a(in[0], at(0, 3, rope), nullptr);
  };
  CHECK(gradcheck(f, {normal_tensor(rng, {1, 3, 6}), layer.q_proj.dense(), layer.k_proj.dense(),
                      layer.v_proj.dense(), layer.o_proj.dense(), layer.k_norm->weight}));
}

TEST_CASE("the cache says when it is full and what does not fit") {
  KVCache cache(1, 4, 2, 8);
  const Tensor three = Tensor::zeros({1, 3, 2, 8}), two = Tensor::zeros({1, 2, 2, 8});
  cache.append(three, three);
  CHECK_THROWS_WITH_AS(cache.append(two, two),
                       "context is full: 3 tokens cached, 2 more wanted, room for 4", Error);
  CHECK(cache.length() == 3);
  const Tensor wrong = Tensor::zeros({1, 1, 3, 8});
  CHECK_THROWS_WITH_AS(cache.append(wrong, wrong),
                       "kv cache [1, 4, 2, 8]: cannot append [1, 1, 3, 8]", Error);
  CHECK_THROWS_WITH_AS(cache.append(Tensor::zeros({1, 1, 2, 8}), two),
                       "kv cache: keys [1, 1, 2, 8] and values [1, 2, 2, 8] differ", Error);
  CHECK_THROWS_WITH_AS(cache.truncate(4), "kv cache: cannot truncate 3 tokens to 4", Error);
  CHECK_THROWS_AS(cache.truncate(-1), Error);
}

TEST_CASE("no gradient is lost silently in a cache") {
  const Sizes z;
  Rng rng(5);
  const Attention layer = make(z, rng, DType::F32, {});
  KVCache cache(1, 4, z.kv_heads, z.head_dim);
  const Tensor x = parameter(normal_tensor(rng, {1, 2, z.D}, DType::F32));
  const RopeTables rope = tables(z, DType::F32, {});
  CHECK_THROWS_WITH_AS(layer(x, at(0, 2, rope), &cache),
                       "attention: no gradient goes through a KV cache; train without one", Error);
  NoGrad off;
  CHECK_NOTHROW(layer(x, at(0, 2, rope), &cache));
}

TEST_CASE("positions beyond the tables are refused") {
  const RopeTables t = rope_tables(rope_frequencies(8, 1e4, {}), 16);
  CHECK(positions(14, 2, t).index.to_vector<int32_t>() == std::vector<int32_t>{14, 15});
  CHECK_THROWS_WITH_AS(positions(15, 2, t),
                       "positions 15…16 leave the rotary table of 16; raise the context length",
                       Error);
}

}  // namespace omq::nn
