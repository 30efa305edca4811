// What GPTQ is solved on: which matrices read one tensor, the products of their inputs, and that
// inside a block each is solved behind the rounded ones before it.
#include "quant/hessian.h"

#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "quant/calibrate.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"

namespace omq::quant {
namespace {

constexpr int64_t kTokens = 9;

CommitData some_data(Rng& rng, int64_t windows = 3) {
  return {normal_tensor(rng, {windows, kTokens, kHidden}, DType::F32),
          nn::positions(0, kTokens, small_rope(kTokens)),
          {}};
}

// 2·XᵀX / tokens of linear i in F64, from the inputs that each window gives it.
Tensor by_hand(const nn::Block& block, size_t i, const CommitData& data,
               std::optional<RowQuant> quant = {}) {
  NoGrad off;
  Tensor sum;
  for (int64_t w = 0; w < data.x.dim(0); ++w) {
    Tensor x = linear_inputs(block, slice(data.x, 0, w, w + 1), data.at).at(i);
    if (quant) x = fake_quant_rows(x, *quant);
    const Tensor rows = converted(reshape(x, {-1, x.dim(-1)}), DType::F64);
    const Tensor products = matmul(transpose(rows, 0, 1), rows);
    sum = sum.defined() ? sum + products : products;
  }
  return sum * (2.0 / static_cast<double>(data.x.dim(0) * kTokens));
}

TEST_CASE("hessian: matrices that read one tensor are one stage") {
  Rng rng(1);
  const LlamaBlock block = random_block(rng);
  CHECK(stages_of(block, some_data(rng)) == Stages{{0, 1, 2}, {3}, {4, 5}, {6}});
}

TEST_CASE("hessian: the products of the inputs of every linear, on every device") {
  Rng rng(2);
  const LlamaBlock block = random_block(rng);
  const CommitData data = some_data(rng);
  for (Device d : test_devices())
    for (const bool on_host : {false, true}) {
      CAPTURE(d);
      CommitData there = data;
      if (!on_host) there.x = to(data.x, d);
      there.at = {to(data.at.index, d), {to(data.at.tables.cos, d), to(data.at.tables.sin, d)}};
      for (const size_t i : {0, 3, 5, 6}) {
        CAPTURE(i);
        const Tensor h = hessian_of(block, i, there);
        CHECK(h.device() == Device{});
        CHECK(close(h, by_hand(block, i, data), 1e-10));
      }
    }
}

TEST_CASE("hessian: with quantised activations the inputs are the quantised ones") {
  Rng rng(3);
  LlamaBlock block = random_block(rng);
  const RowQuant four{.bits = 4};
  nn::quantize_activations(block, {four, {}, {}, {}, {}});
  const CommitData data = some_data(rng);
  const Tensor h = hessian_of(block, 6, data);
  CHECK(close(h, by_hand(block, 6, data, four), 1e-10));
  CHECK_FALSE(close(h, by_hand(block, 6, data), 1e-6));
}

TEST_CASE("gptq: a matrix is solved on the inputs that the rounded ones before it leave") {
  Rng rng(4);
  LlamaBlock fp = random_block(rng);
  const CommitData data = some_data(rng);
  const Recipe recipe = gptq({.spec = {.wbits = 2, .group_size = 32}});
  const BlockMethod method(recipe, fp);
  const auto committed = method.commit(fp, &data);
  const auto packed = committed.packed->linears(), dense = committed.simulated->linears(),
             exact = fp.linears();
  const GroupSpec spec = recipe.spec.weight();
  int differ = 0;
  for (size_t i = 0; i < packed.size(); ++i) {
    CAPTURE(packed[i].name);
    // The block in which all that stand before its stage are rounded, and nothing else is.
    LlamaBlock half = fp;
    const auto linears = half.linears();
    const size_t stage[] = {0, 0, 0, 3, 4, 4, 6};
    for (size_t j = 0; j < stage[i]; ++j) linears[j].linear->weight = dense[j].linear->dense();
    const Unpacked u = unpack_codes(packed_of(*packed[i].linear));
    const Tensor w = exact[i].linear->dense();
    const auto solved = [&](const nn::Block& b) {
      return recipe.rounder->codes(w, {u.scale, u.zero}, spec, hessian_of(b, i, data))
          .to_vector<uint8_t>();
    };
    CHECK(u.codes.to_vector<uint8_t>() == solved(half));
    differ += u.codes.to_vector<uint8_t>() != solved(fp);
    CHECK(bit_equal(u.scale, to(to(minmax_clip(w, spec)->grid(w).scale, DType::F16), DType::F32)));
  }
  CHECK(differ >= 2);  // it matters behind the first stage
}

TEST_CASE("gptq: without text it says so") {
  RandomSource source(1);
  KeptBlocks sink;
  CHECK_THROWS_WITH_AS(quantize(source, sink, gptq({}), {}),
                       doctest::Contains("method gptq: rounding needs calibration text"), Error);
  CHECK(gptq({}).needs_text());
  CHECK_FALSE(rtn({}).needs_text());
}

TEST_CASE("gptq: polled between windows, so that a run can be ended") {
  Rng rng(5);
  LlamaBlock fp = random_block(rng);
  CommitData data = some_data(rng);
  int polls = 0;
  data.poll = [&] { ++polls; };
  const Recipe recipe = gptq({});
  BlockMethod(recipe, fp).commit(fp, &data);
  CHECK(polls == 4 * 3);
}

}  // namespace
}  // namespace omq::quant
