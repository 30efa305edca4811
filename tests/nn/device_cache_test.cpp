// Attention of one new token on a device against what its cache holds, in every form that a cache
// has there, beside the same in steps on the CPU.
#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "nn/attention.h"
#include "nn/linear_input.h"
#include "tensor/decode_kernels.h"
#include "tests/support/device_packed.h"

namespace omq::nn {
namespace {

constexpr Device kHost{};

// All that a cache holds of its first tokens, as F32 on the CPU.
Tensor held(const KVCache::Store& s, int64_t tokens) {
  const Tensor all = s.floats.defined() ? to(s.floats, DType::F32) : dequantized(s.codes);
  return contiguous(slice(to(all, kHost), 1, 0, tokens));
}

struct Case {
  int64_t rows, heads, kv_heads, d, capacity, past;
  CacheQuant quant;
};

void check_attention(const Case& c, Device device) {
  Rng rng(static_cast<uint64_t>(c.d + c.past));
  const int64_t B = c.rows, H = c.heads, K = c.kv_heads, d = c.d, splits = 3;
  KVCache cache(B, c.capacity, K, d, device, c.quant);
  const auto random = [&](const Shape& shape) { return normal_tensor(rng, shape, DType::F32); };
  const Shape old{B, c.past, K, d};
  if (c.past > 0) cache.append(to(random(old), device), to(random(old), device));
  const Tensor qkv = random({B, (H + 2 * K) * d});
  const auto part = [&](int64_t first, int64_t heads) {
    return reshape(contiguous(slice(qkv, 1, first * d, (first + heads) * d)), {B, 1, heads, d});
  };
  const Tensor q = part(0, H), k = part(H, K), v = part(H + K, K);
  const RopeTables tables = rope_tables(rope_frequencies(d, 1e4, {}), c.capacity);
  const auto on_device = [&](const Tensor& t) { return to(t, device); };
  const std::vector<int32_t> position(static_cast<size_t>(B), static_cast<int32_t>(c.past));
  Tensor y = Tensor::zeros({B, H * d}, DType::F32, device);
  DecodeAttentionStage s;
  s.qkv = on_device(qkv);
  s.cos = on_device(tables.cos), s.sin = on_device(tables.sin);
  s.position = on_device(Tensor::from<int32_t>(position, {B}));
  s.k = c.quant.k, s.v = c.quant.v;
  s.keys = {cache.keys().floats, cache.keys().codes};
  s.values = {cache.values().floats, cache.values().codes};
  s.parts = Tensor::zeros({B, H, splits, d + 2}, DType::F32, device);
  s.arrived = Tensor::zeros({B, H}, DType::I32, device);
  s.y = y;
  s.heads = H, s.kv_heads = K, s.head_dim = d;
  const DecodeKernels& kernels = *decode_kernels(device);
  RowMatrix behind;  // takes y as F32, and prepared
  if (B == 1 && d % 32 == 0) {
    behind.weight = random_packed(rng, 48, H * d, {.bits = 2, .group_size = 32}, device).device;
    const int64_t bytes = kernels.prepared_bytes({}, {{&behind, 1}, RowOutput::Store});
    REQUIRE(bytes > 0);
    s.prepared = Tensor::zeros({bytes}, DType::U8, device);
  }
  kernels.attention(s);
  if (s.prepared.defined()) {
    Tensor from_floats = Tensor::empty({1, 48}, DType::F32, device),
           from_prepared = Tensor::empty({1, 48}, DType::F32, device);
    kernels.products(from_floats, {.x = y}, {&behind, 1}, RowOutput::Store, {});
    const Tensor unread = Tensor::full({1, H * d}, NAN, DType::F32, device);
    kernels.products(from_prepared, {.x = unread, .prepared = s.prepared}, {&behind, 1},
                     RowOutput::Store, {});
    CHECK(close(from_prepared, from_floats, 1e-12));  // the same whole numbers
  }
  cache.advance(1);

  const Positions at = positions(c.past, 1, tables);
  const auto turned = [&](const Tensor& x) { return rope(x, tables.cos, tables.sin, at.index); };
  const auto rounded = [](const Tensor& x, const std::optional<RowQuant>& grid) {
    return grid ? fake_quant_rows(x, *grid) : x;
  };
  const Tensor new_k = rounded(turned(k), c.quant.k), new_v = rounded(v, c.quant.v);
  const Tensor keys = held(cache.keys(), c.past + 1), values = held(cache.values(), c.past + 1);
  const auto newest = [&](const Tensor& x) { return contiguous(slice(x, 1, c.past, c.past + 1)); };
  CHECK(close(newest(keys), new_k, c.quant.k ? 1e-10 : 1e-6));
  CHECK(close(newest(values), new_v, c.quant.v ? 1e-12 : 1e-6));
  const AttentionSpec spec{.scale = 1 / std::sqrt(static_cast<double>(d)), .causal = true};
  const Tensor want = attention(turned(q), keys, values, spec);
  CHECK(close(reshape(to(y, kHost), {B, 1, H, d}), want, 1e-6));
}

}  // namespace

TEST_CASE("devices: attention of a new token reads every form of a cache") {
  const NoGrad off;
  int found = 0;
  for (const Device device : test_devices()) {
    if (!decode_kernels(device)) continue;
    ++found;
    CAPTURE(device);
    const auto run = [&] {
      for (const auto& quant :
           {CacheQuant{{}, {}, DType::F16}, CacheQuant{RowQuant{.bits = 8}, RowQuant{.bits = 8}},
            CacheQuant{RowQuant{.bits = 6}, RowQuant{.bits = 8, .include_zero = false}},
            CacheQuant{RowQuant{.bits = 4}, RowQuant{.bits = 3, .clip = 0.9}}})
        for (const int64_t d : {6, 32, 64, 96, 128, 160, 256})
          for (const int64_t past : {0, 1, 31, 32, 70, 127})
            for (const int64_t rows : {1, 3}) {
              CAPTURE(quant.k ? quant.k->bits : 16);
              CAPTURE(d);
              CAPTURE(past);
              CAPTURE(rows);
              check_attention({rows, 6, 2, d, 128, past, quant}, device);
            }
    };
    run();
    const PlainPath plain(device);
    run();
  }
  if (found == 0) MESSAGE("skipped: no device here has kernels for it");
}

TEST_CASE("devices: a new token that is no number spoils its own place in a cache of codes alone") {
  const NoGrad off;
  for (const Device device : test_devices()) {
    CAPTURE(device);
    KVCache cache(1, 4, 1, 32, device, {RowQuant{.bits = 8}, RowQuant{.bits = 8}});
    Tensor bad = Tensor::full({1, 1, 1, 32}, 1, DType::F32);
    const Tensor good = Tensor::full(bad.shape(), 1, DType::F32, device);
    bad.data<float>()[5] = NAN;
    cache.append(good, good);
    cache.append(to(bad, device), good);
    cache.append(good, good);
    const auto keys = held(cache.keys(), 3).to_vector<float>();
    for (size_t i = 0; i < 32; ++i) {
      CHECK(keys[i] == doctest::Approx(1));
      CHECK(std::isnan(keys[32 + i]));
      CHECK(keys[64 + i] == doctest::Approx(1));
    }
  }
}

TEST_CASE("devices: windows of a cache of codes are what was stored") {
  const NoGrad off;
  Rng rng(2);
  const Tensor k = normal_tensor(rng, {2, 9, 3, 16}, DType::F32),
               v = normal_tensor(rng, {2, 9, 3, 16}, DType::F32);
  for (const Device device : test_devices())
    for (const int bits : {3, 8}) {
      CAPTURE(device);
      CAPTURE(bits);
      const RowQuant grid{.bits = bits};
      KVCache cache(2, 12, 3, 16, device, {grid, grid});
      cache.append(to(k, device), to(v, device));
      const KVCache::View seen = cache.window(2, 7);
      const auto wanted = [&](const Tensor& x) {
        return fake_quant_rows(contiguous(slice(x, 1, 2, 7)), grid);
      };
      CHECK(close(to(to(seen.k, DType::F32), kHost), wanted(k), 1e-6));
      CHECK(close(to(to(seen.v, DType::F32), kHost), wanted(v), 1e-6));
    }
}

}  // namespace omq::nn
