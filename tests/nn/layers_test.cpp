// The small layers: linear over dense weights of three types, norm, embedding, gated MLP, and what
// visit() lists.
#include <doctest/doctest.h>

#include <map>
#include <string>

#include "autograd/backward.h"
#include "nn/block.h"
#include "nn/embedding.h"
#include "nn/linear.h"
#include "nn/mlp.h"
#include "nn/norm.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/gradcheck.h"

namespace omq::nn {
namespace {

std::map<std::string, Shape> visited(auto&& layer) {
  std::map<std::string, Shape> names;
  layer.visit([&](std::string_view name, Tensor& t) { names[std::string(name)] = t.shape(); });
  return names;
}

}  // namespace

TEST_CASE("linear over F32, F16 and BF16 weights") {
  for (Device d : test_devices())
    for (int64_t tokens : {1, 3, 8, 40}) {
      CAPTURE(d);
      CAPTURE(tokens);
      Rng rng(static_cast<uint64_t>(tokens));
      const Tensor x = normal_tensor(rng, {2, tokens, 70}), w = normal_tensor(rng, {50, 70});
      const Tensor b = normal_tensor(rng, {50}), exact = omq::linear(x, w, b);
      const Tensor xd = converted(x, DType::F32, d), bd = converted(b, DType::F32, d);
      for (DType dtype : {DType::F32, DType::F16, DType::BF16}) {
        CAPTURE(dtype_name(dtype));
        const Linear layer{converted(w, dtype, d), bd, {}};
        // against the weight as stored: only the product rounds, and on a GPU many rows of x do,
        // to 11 bits (tensor/packed.h)
        const Tensor stored = omq::linear(x, converted(converted(w, dtype), DType::F64), b);
        const bool x_rounds =
            d.type == DeviceType::CUDA && tokens > kFewRows && dtype != DType::F32;
        CHECK(close(layer(xd), stored, x_rounds ? 1e-7 : 1e-11));
        // against the weight as it was: half a unit in the last place of 11 or 8 bits
        CHECK(close(layer(xd), exact,
                    dtype == DType::F32   ? 1e-11
                    : dtype == DType::F16 ? 1e-6
                                          : 1e-5));
      }
    }
}

TEST_CASE("linear is the same with history and without") {
  Rng rng(1);
  const Tensor x = normal_tensor(rng, {3, 40}, DType::F32),
               w = normal_tensor(rng, {20, 40}, DType::F32);
  const Linear plain{w, {}, {}}, learning{parameter(w), {}, {}};
  CHECK(plain(x).node() == nullptr);
  CHECK(learning(x).node() != nullptr);
  CHECK(close(plain(x), learning(x), 1e-12));
  CHECK(gradcheck(
      [](const auto& in) {
        return Linear{in[1], in[2], {}}(in[0]);
      },
      {normal_tensor(rng, {2, 3, 4}), normal_tensor(rng, {5, 4}), normal_tensor(rng, {5})}));
}

TEST_CASE("linear takes strided inputs and weights") {
  Rng rng(2);
  const Tensor x = normal_tensor(rng, {40, 3}, DType::F32),
               w = normal_tensor(rng, {40, 20}, DType::F32);
  const Linear strided{transpose(w, 0, 1), {}, {}}, plain{contiguous(transpose(w, 0, 1)), {}, {}};
  CHECK(close(strided(transpose(x, 0, 1)), plain(contiguous(transpose(x, 0, 1))), 1e-13));
}

TEST_CASE("what hooks in before a linear sees its input") {
  const Tensor w = Tensor::from<float>({1, 2}, {1, 2}), x = Tensor::from<float>({10, 100}, {1, 2});
  const Linear layer{w, {}, {}, [](const Tensor& in) { return in * 2.0; }};
  CHECK(layer(x).item<float>() == 420.0f);
}

TEST_CASE("linear knows its sizes and says what does not fit") {
  const Linear layer{Tensor::zeros({5, 4}), {}, {}};
  CHECK(layer.out_features() == 5);
  CHECK(layer.in_features() == 4);
  CHECK_FALSE(layer.is_packed());
  CHECK(layer.dense().shape() == Dims{5, 4});
  CHECK_THROWS_WITH_AS(layer(Tensor::zeros({2, 3})),
                       "linear: inner dims differ: x [2, 3] · w [5, 4]ᵀ", Error);
  const Tensor learning = parameter(Tensor::zeros({2, 4}));
  const Linear half{Tensor::zeros({5, 4}, DType::BF16), {}, {}};
  CHECK_THROWS_WITH_AS(half(learning), "linear: dtypes differ: F32 and BF16", Error);
}

TEST_CASE("a packed linear multiplies what it would dequantise to") {
  Rng rng(4);
  for (int bits : {2, 3, 4, 8}) {
    CAPTURE(bits);
    const GroupSpec spec{.bits = bits, .group_size = 32};
    Tensor codes = Tensor::empty({20, 72}, DType::U8);
    for (int64_t i = 0; i < codes.numel(); ++i)
      codes.data<uint8_t>()[i] = static_cast<uint8_t>(rng.between(0, spec.max_code()));
    const Tensor scale = converted(
        converted(random_tensor(rng, {20, 3}, DType::F64, 0.01, 0.1), DType::F16), DType::F32);
    const Tensor zero = round(random_tensor(rng, {20, 3}, DType::F32, 0, spec.max_code()));
    const PackedInt packed = pack_codes(codes, scale, zero, spec);
    const auto weight = packed_int_weight(packed.data, 20, 72, spec);
    const Tensor bias = normal_tensor(rng, {20}, DType::F32),
                 x = normal_tensor(rng, {2, 3, 72}, DType::F32);
    Linear layer{weight, bias, {}};
    const Tensor dense = weight->dequantize();
    CHECK(dense.shape() == Dims{20, 72});
    CHECK(close(layer(x), omq::linear(x, dense, bias), 1e-8));
    CHECK(layer.out_features() == 20);
    CHECK(layer.in_features() == 72);
    CHECK(weight->bits_per_weight() ==
          doctest::Approx(8.0 * static_cast<double>(packed.nbytes()) / (20 * 72)));
    CHECK(visited(layer) ==
          std::map<std::string, Shape>{{"packed", packed.data.shape()}, {"bias", {20}}});
    const Tensor ids = Tensor::from<int32_t>({19, 0, 7}, {1, 3});
    CHECK(bit_equal(Embedding{weight}(ids), omq::embedding(dense, ids)));
    CHECK_THROWS_WITH_AS(layer.dense(),
                         "linear: the weight is packed already; a dense one is wanted", Error);
    CHECK_THROWS_WITH_AS(layer(Tensor::zeros({1, 71})),
                         "packed matmul: x [1, 71] against a weight [20, 72]", Error);
    CHECK_THROWS_WITH_AS(
        layer(parameter(x)),
        "packed matmul: no gradient goes through packed weights; dequantize() to train", Error);
    CHECK_THROWS_WITH_AS(packed_int_weight(packed.data, 40, 72, spec),
                         doctest::Contains("packed weight [40, 72]"), Error);
  }
}

namespace {

Linear packed_linear(Rng& rng, int64_t out, int64_t in, GroupSpec spec) {
  Tensor codes = Tensor::empty({out, in}, DType::U8);
  for (int64_t i = 0; i < codes.numel(); ++i)
    codes.data<uint8_t>()[i] = static_cast<uint8_t>(rng.between(0, spec.max_code()));
  const Shape grid{out, spec.groups(in)};
  const Tensor scale =
      converted(converted(random_tensor(rng, grid, DType::F64, 0.01, 0.1), DType::F16), DType::F32);
  const Tensor zero = round(random_tensor(rng, grid, DType::F32, 0, spec.max_code()));
  const PackedInt packed = pack_codes(codes, scale, zero, spec);
  return {packed_int_weight(packed.data, out, in, spec), normal_tensor(rng, {out}, DType::F32)};
}

Tensor dense_of(const Linear& l) {
  return std::get<std::shared_ptr<PackedWeight>>(l.weight)->dequantize();
}

}  // namespace

TEST_CASE("a linear with a quantised input: in integers where packed, simulated where dense") {
  Rng rng(6);
  for (int wbits : {2, 3, 4, 8})
    for (int abits = 2; abits <= 8; ++abits)
      for (bool include_zero : {true, false}) {
        CAPTURE(wbits);
        CAPTURE(abits);
        CAPTURE(include_zero);
        const RowQuant s{.bits = abits, .include_zero = include_zero};
        Linear packed = packed_linear(rng, 20, 72, {.bits = wbits, .group_size = 32});
        packed.input_quant = s;
        const Tensor w = dense_of(packed);
        Linear dense{w, packed.bias};
        dense.input_quant = s;
        for (int64_t tokens : {1, 3, 20}) {
          const Tensor x = normal_tensor(rng, {2, tokens, 72}, DType::F32);
          const Tensor want = omq::linear(fake_quant_rows(x, s), w, packed.bias);
          CHECK(close(packed(x), want, include_zero ? 1e-11 : 1e-8));
          CHECK(close(dense(x), want, 1e-11));
        }
      }
}

TEST_CASE("inputs that linears share are quantised once") {
  Rng rng(7);
  const Tensor x = normal_tensor(rng, {2, 3, 72}, DType::F32);
  const LinearInput in(x);
  const RowQuant four{.bits = 4}, eight{.bits = 8};
  const void* codes = in.codes(four).codes.raw();
  CHECK(in.codes(four).codes.raw() == codes);
  CHECK(in.codes(eight).codes.raw() != codes);
  CHECK(in.codes(eight).spec == eight);
  CHECK(bit_equal(dequantized(in.codes(four)), fake_quant_rows(x, four)));
  CHECK(bit_equal(in.simulated(four), fake_quant_rows(x, four)));
  CHECK(in.simulated(four).raw() == in.simulated(four).raw());
  // Gradients of both readers meet before they go through the quantiser.
  const Tensor a = normal_tensor(rng, {5, 72}, DType::F32), p = parameter(x);
  Linear one{a, {}};
  one.input_quant = four;
  const LinearInput shared(p);
  CHECK(backward(sum(one(shared) + one(shared)))[p].defined());
  CHECK(shared.simulated(four).node() != nullptr);
  Linear packed = packed_linear(rng, 20, 72, {.bits = 4});
  packed.input_quant = four;
  // What a layer made of its input stays there for the next one.
  const LinearInput common(x);
  const size_t before = cpu_memory_use().now;
  const Tensor y = packed(common);
  CHECK(cpu_memory_use().now - before >= y.nbytes() + static_cast<size_t>(x.numel()));
  CHECK_THROWS_WITH_AS(
      packed(shared),
      "packed matmul: no gradient goes through packed weights; dequantize() to train", Error);
  CHECK_THROWS_WITH_AS(packed(Tensor::zeros({1, 71})),
                       "packed matmul: codes [1, 71] against a weight [20, 72]", Error);
}

TEST_CASE("an onlooker sees the input before it is quantised") {
  const Tensor x = Tensor::from<float>({0.1f, 1, 15}, {1, 3});
  Tensor seen;
  Linear layer{Tensor::full({1, 3}, 1), {}};
  layer.pre = [&](const Tensor& in) { return seen = in; };
  layer.input_quant = RowQuant{.bits = 4};
  CHECK(layer(x).item<float>() == 16.0f);
  CHECK(bit_equal(seen, x));
}

TEST_CASE("RMSNorm is the formula, and lists a bias only when it has one") {
  Rng rng(3);
  const Tensor x = normal_tensor(rng, {2, 3, 8}), w = normal_tensor(rng, {8}),
               b = normal_tensor(rng, {8});
  Tensor want = empty_like(x);
  for (int64_t r = 0; r < 6; ++r) {
    double ss = 0;
    for (int64_t i = 0; i < 8; ++i) ss += x.data<double>()[r * 8 + i] * x.data<double>()[r * 8 + i];
    for (int64_t i = 0; i < 8; ++i)
      want.data<double>()[r * 8 + i] =
          x.data<double>()[r * 8 + i] / std::sqrt(ss / 8 + 1e-3) * w.data<double>()[i] +
          b.data<double>()[i];
  }
  CHECK(close(RMSNorm{w, b, 1e-3}(x), want, 1e-28));
  for (Device d : test_devices())
    CHECK(close(RMSNorm{converted(w, DType::F32, d), converted(b, DType::F32, d),
                        1e-3}(converted(x, DType::F32, d)),
                want, 1e-13));
  CHECK(visited(RMSNorm{w, {}, 1e-5}) == std::map<std::string, Shape>{{"weight", {8}}});
  CHECK(visited(RMSNorm{w, b, 1e-5}).contains("bias"));
  CHECK(close(RMSNorm{w, {}, 1e-5}(Tensor::zeros({1, 8}, DType::F64)),
              Tensor::zeros({1, 8}, DType::F64), 0));
}

TEST_CASE("embedding reads rows, and equal ids add their gradients") {
  const Tensor table = Tensor::from<float>({0, 1, 2, 3, 4, 5}, {3, 2}),
               ids = Tensor::from<int32_t>({2, 0, 2}, {1, 3});
  CHECK(Embedding{table}(ids).shape() == Dims{1, 3, 2});
  CHECK(Embedding{table}(ids).to_vector<float>() == std::vector<float>{4, 5, 0, 1, 4, 5});
  CHECK(close(Embedding{converted(table, DType::BF16)}(ids), Embedding{table}(ids), 0));
  const Tensor p = parameter(table);
  CHECK(backward(sum(Embedding{p}(ids)))[p].to_vector<float>() ==
        std::vector<float>{1, 1, 0, 0, 2, 2});
}

TEST_CASE("the gated MLP is its formula, with gradients") {
  Rng rng(5);
  const Tensor x = normal_tensor(rng, {2, 3, 4}), gate = normal_tensor(rng, {6, 4}),
               up = normal_tensor(rng, {6, 4});
  const Tensor down = normal_tensor(rng, {4, 6});
  const auto mlp = [](const auto& in) {
    return MLP{{in[1], {}, {}}, {in[2], {}, {}}, {in[3], {}, {}}}(in[0]);
  };
  CHECK(close(mlp(std::vector<Tensor>{x, gate, up, down}),
              omq::linear(silu(omq::linear(x, gate)) * omq::linear(x, up), down), 1e-28));
  CHECK(gradcheck(mlp, {x, gate, up, down}));
}

}  // namespace omq::nn
