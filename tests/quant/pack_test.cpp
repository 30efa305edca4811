// What every method commits: the simulated weights are the packed ones to the last bit, codes and
// zero points are whole and in range, scales are f16 values; for any width, group size and shape,
// and for rows of every kind.
#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "nn/packed_weight.h"
#include "quant/calibrate.h"
#include "tensor/numeric.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

// Everything that holds for a weight w and its packed form. nearest: w is what was rounded, to
// nearest.
void check_packed(const Tensor& w, const PackedInt& packed, const Tensor& simulated,
                  const GroupSpec& spec, bool nearest = true) {
  CHECK(packed.spec == stored_spec(spec));
  CHECK(packed.rows == w.dim(0));
  CHECK(packed.cols == w.dim(1));
  CHECK(bit_equal(nn::PackedIntWeight(packed).dequantize(), simulated));

  const Unpacked u = unpack_codes(packed);
  int64_t wrong = 0;
  for (const uint8_t c : u.codes.to_vector<uint8_t>()) wrong += c > spec.max_code();
  CHECK(wrong == 0);
  for (const float z : u.zero.to_vector<float>())
    wrong += !(z >= 0 && z <= static_cast<float>(spec.max_code()) && z == std::nearbyint(z));
  CHECK(wrong == 0);
  for (const float h : u.scale.to_vector<float>())
    wrong += !(h > 0 && f16_bits_to_f32(f32_to_f16_bits(h)) == h);
  CHECK(wrong == 0);
  // The grid that was stored, applied to the weight again, is the stored weight.
  if (nearest) CHECK(bit_equal(fake_quant(w, u.scale, u.zero, spec), simulated));
}

Tensor nearest(const Tensor& w, const QuantSpec& spec, PackedInt* packed = nullptr) {
  const auto weight = pack_nearest(w, spec);
  const PackedInt& p = dynamic_cast<const nn::PackedIntWeight&>(*weight).packed();
  check_packed(w, p, weight->dequantize(), spec.weight());
  if (packed) *packed = p;
  return weight->dequantize();
}

const int64_t kGroups[] = {0, 32, 40, 64};

TEST_CASE("commit: what is simulated is what is packed, for every method and setting") {
  Rng rng(11);
  const nn::Positions at = nn::positions(0, 6, small_rope(6));
  for (const MethodInfo& method : methods())
    for (int bits = 2; bits <= 8; ++bits)
      for (const int64_t group : kGroups)
        for (const bool symmetric : {false, true}) {
          CAPTURE(method.name);
          CAPTURE(bits);
          CAPTURE(group);
          CAPTURE(symmetric);
          const QuantSpec spec{.wbits = bits, .group_size = group, .symmetric = symmetric};
          const Recipe recipe = make_recipe(method.name, {.spec = spec});
          LlamaBlock fp = random_block(rng);
          const BlockMethod block(recipe, fp);
          const CommitData data{normal_tensor(rng, {2, 6, kHidden}, DType::F32), at, {}};
          const BlockMethod::Committed c = block.commit(fp, &data);
          const auto start = block.transformed(fp);
          const auto dense = start->linears(), simulated = c.simulated->linears(),
                     packed = c.packed->linears();
          REQUIRE(packed.size() == 7);
          for (size_t i = 0; i < packed.size(); ++i) {
            CAPTURE(packed[i].name);
            check_packed(dense[i].linear->dense(), packed_of(*packed[i].linear),
                         simulated[i].linear->dense(), spec.weight(), recipe.line.round != "gptq");
          }
          NoGrad off;
          const Tensor x = normal_tensor(rng, {1, 6, kHidden}, DType::F32);
          CHECK(
              close(c.packed->forward(x, at, nullptr), c.simulated->forward(x, at, nullptr), 1e-8));
        }
}

TEST_CASE("commit: simulated training and committed block differ by the scale's rounding alone") {
  Rng rng(12);
  LlamaBlock fp = random_block(rng);
  const Recipe recipe =
      make_recipe("omniquant", {.spec = {.wbits = 4, .abits = 16, .group_size = 32}});
  const BlockMethod method(recipe, fp);
  NoGrad off;
  const auto trained = method.quantized(fp);
  const auto committed = method.commit(fp);
  const auto a = trained->linears(), b = committed.simulated->linears();
  for (size_t i = 0; i < a.size(); ++i)  // 2⁻¹¹ of each scale, now and then another code
    CHECK(close(b[i].linear->dense(), a[i].linear->dense(), 1e-4));
  // The block itself, and its Storage, stay as they were.
  Rng again(12);
  LlamaBlock same = random_block(again);
  const auto before = same.linears(), after = fp.linears();
  for (size_t i = 0; i < before.size(); ++i)
    CHECK(bit_equal(after[i].linear->dense(), before[i].linear->dense()));
}

TEST_CASE("packing to nearest: random matrices of any shape") {
  for_all(
      80, [](Rng& rng) { return rng; },
      [](Rng rng) {
        const QuantSpec spec{.wbits = static_cast<int>(rng.between(2, 8)),
                             .group_size = kGroups[rng.between(0, 3)],
                             .symmetric = rng.coin()};
        const double size = std::pow(10.0, rng.uniform(-3, 2));
        const Tensor w =
            normal_tensor(rng, {rng.between(1, 40), rng.between(1, 100)}, DType::F32, size);
        CAPTURE(spec.to_string());
        CAPTURE(w.shape());
        nearest(w, spec);
      });
}

TEST_CASE("packing to nearest: rows of every kind") {
  for (int bits = 2; bits <= 8; ++bits)
    for (const int64_t group : {0, 32}) {
      CAPTURE(bits);
      CAPTURE(group);
      const QuantSpec spec{.wbits = bits, .group_size = group};
      const Tensor silent = Tensor::zeros({3, 72});
      CHECK(bit_equal(nearest(silent, spec), silent));
      // A constant survives up to the rounding of its scale, whatever its sign.
      for (const double value : {1.0, -1.0, 0.37, -0.05, 250.0}) {
        const Tensor constant = Tensor::full({2, 72}, value);
        CHECK(within(nearest(constant, spec), constant, std::abs(value) * 0x1p-11));
      }
      Rng rng(static_cast<uint64_t>(bits));
      for (const double sign : {1.0, -1.0}) {  // all weights on one side: the zero point is an end
        const Tensor w = random_tensor(rng, {5, 72}, DType::F32, 0.5, 2) * sign;
        PackedInt p;
        const Tensor y = nearest(w, spec, &p);
        for (const float z : unpack_codes(p).zero.to_vector<float>())
          CHECK(z == (sign > 0 ? 0.0f : static_cast<float>((1 << bits) - 1)));
        CHECK(within(y, w, 2.0 / ((1 << bits) - 1) * 0.5 + 2e-3));
      }
    }
}

TEST_CASE("packing to nearest: symmetric rows use the whole code range") {
  const QuantSpec spec{.wbits = 3, .symmetric = true};
  const Tensor w = Tensor::from<float>({-3.5f, -2.9f, -1, 0, 1, 2, 2.9f, 3.5f}, {1, 8});
  PackedInt p;
  CHECK(bit_equal(nearest(w, spec, &p), Tensor::from<float>({-4, -3, -1, 0, 1, 2, 3, 3}, {1, 8})));
  CHECK(unpack_codes(p).codes.to_vector<uint8_t>() == std::vector<uint8_t>{0, 1, 3, 4, 5, 6, 7, 7});
  CHECK(p.grid_bytes() == 32);  // no zero points are stored
}

TEST_CASE("packing: five to seven bits are stored as eight, the last group may be short") {
  Rng rng(2);
  const Tensor w = normal_tensor(rng, {20, 72}, DType::F32);
  for (const int bits : {5, 6, 7})
    for (const bool symmetric : {false, true}) {
      PackedInt p;
      nearest(w, {.wbits = bits, .group_size = 32, .symmetric = symmetric}, &p);
      CHECK(p.spec.bits == 8);
      CHECK_FALSE(p.spec.symmetric);  // zero points are written out
      CHECK(p.groups() == 3);
      CHECK(p.group_columns(2) == 8);
      if (!symmetric) continue;
      for (const float z : unpack_codes(p).zero.to_vector<float>())
        CHECK(z == static_cast<float>(1 << (bits - 1)));
    }
  // Finer codes, smaller errors.
  double last = 1e9;
  for (int bits = 2; bits <= 8; ++bits) {
    const Tensor d = nearest(w, {.wbits = bits, .group_size = 32}) - w;
    const double error = static_cast<double>(sum(square(d)).item<float>());
    CHECK(error < 0.5 * last);
    last = error;
  }
}

TEST_CASE("packing: a matrix with numbers that are none is refused") {
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    Tensor w = Tensor::full({2, 8}, 0.5);
    w.data<float>()[11] = bad;
    CAPTURE(bad);
    CHECK_THROWS_AS(pack_nearest(w, {}), Error);
    CHECK_THROWS_AS(pack_nearest(w, {.symmetric = true}), Error);
  }
}

}  // namespace
}  // namespace omq::quant
