// What every family of ops says to shapes, dtypes and indices that do not fit.
#include <doctest/doctest.h>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"

namespace omq {
namespace {

Tensor zeros(Shape shape) { return Tensor::zeros(shape); }
Tensor wide(Shape shape) { return Tensor::zeros(shape, DType::F64); }
Tensor ids(std::initializer_list<int32_t> v) {
  return Tensor::from<int32_t>(v, {static_cast<int64_t>(v.size())});
}

}  // namespace

TEST_CASE("binary ops name both shapes or both dtypes") {
  CHECK_THROWS_WITH_AS(add(zeros({2, 3}), zeros({2})),
                       "add: shapes [2, 3] and [2] do not broadcast", Error);
  CHECK_THROWS_WITH_AS(mul(zeros({2, 3}), zeros({3, 3})),
                       "mul: shapes [2, 3] and [3, 3] do not broadcast", Error);
  CHECK_THROWS_WITH_AS(div(zeros({2}), wide({2})),
                       "div: dtypes differ: F32 and F64; convert with to()", Error);
  CHECK_THROWS_WITH_AS(sub(zeros({2}), Tensor{}), "sub: undefined operand", Error);
  const Tensor half = Tensor::zeros({2}, DType::F16);
  CHECK_THROWS_WITH_AS(add(half, half),
                       "binary: computes in F32 (or F64), got F16; convert with to()", Error);
}

TEST_CASE("unary ops compute in F32 and F64 only") {
  CHECK_THROWS_WITH_AS(exp(Tensor::zeros({2}, DType::I32)),
                       "unary: computes in F32 (or F64), got I32; convert with to()", Error);
  CHECK_THROWS_WITH_AS(silu(Tensor{}), "kernel: undefined tensor", Error);
}

TEST_CASE("products name the dims that differ") {
  CHECK_THROWS_WITH_AS(matmul(zeros({2, 3}), zeros({4, 5})),
                       "matmul: inner dims differ: [2, 3] · [4, 5]", Error);
  CHECK_THROWS_WITH_AS(matmul(zeros({2, 3}), zeros({3})),
                       "matmul: [2, 3] · [3]: the same number of dims (≥ 2) wanted", Error);
  CHECK_THROWS_WITH_AS(matmul(zeros({2, 2, 3}), zeros({3, 3, 4})),
                       "matmul: batch dims differ: [2, 2, 3] · [3, 3, 4]", Error);
  CHECK_THROWS_WITH_AS(matmul(zeros({2, 3}), wide({3, 4})), "matmul: dtypes differ: F32 and F64",
                       Error);
  CHECK_THROWS_WITH_AS(linear(zeros({2, 3}), zeros({5, 4})),
                       "linear: inner dims differ: x [2, 3] · w [5, 4]ᵀ", Error);
  CHECK_THROWS_WITH_AS(linear(zeros({2, 4}), zeros({5, 4}), zeros({4})),
                       doctest::Contains("do not broadcast"), Error);
}

TEST_CASE("reductions name the shapes") {
  CHECK_THROWS_WITH_AS(sum_to(zeros({2, 3}), {2}), "sum_to: [2, 3] to [2]", Error);
  CHECK_THROWS_WITH_AS(sum_to(zeros({2, 3}), {2, 2}), "sum_to: [2, 3] to [2, 2]", Error);
  CHECK_THROWS_WITH_AS(mean(zeros({0, 3})), "mean: empty tensor", Error);
}

TEST_CASE("layers name what does not fit") {
  CHECK_THROWS_WITH_AS(rms_norm(zeros({2, 4}), zeros({3}), {}, 1e-5),
                       "rms_norm: x [2, 4] with a weight or bias of [3]", Error);
  CHECK_THROWS_WITH_AS(rms_norm(zeros({2, 4}), {}, zeros({1, 4}), 1e-5),
                       "rms_norm: x [2, 4] with a weight or bias of [1, 4]", Error);
  CHECK_THROWS_WITH_AS(rms_norm(zeros({2, 0}), {}, {}, 1e-5),
                       "rms_norm: x [2, 0] has no last dim to normalise over", Error);
  CHECK_THROWS_WITH_AS(softmax(zeros({2, 0})), "softmax: x [2, 0] has no last dim to sum over",
                       Error);
  CHECK_THROWS_WITH_AS(softmax(zeros({})), "softmax: x [] has no last dim to sum over", Error);
  CHECK_THROWS_WITH_AS(silu_mul(zeros({2, 4}), zeros({4})),
                       "silu_mul: gate [2, 4] and up [4] differ", Error);
}

TEST_CASE("rope names tables and positions that do not fit") {
  const Tensor x = zeros({1, 2, 3, 4}), table = zeros({8, 2});
  CHECK_THROWS_WITH_AS(rope(zeros({1, 2, 3, 5}), table, table, ids({0, 1})),
                       "rope: wants [B,T,H,d] with even d, got [1, 2, 3, 5]", Error);
  CHECK_THROWS_WITH_AS(rope(x, zeros({8, 4}), zeros({8, 4}), ids({0, 1})),
                       "rope: tables [8, 4] and [8, 4] for x [1, 2, 3, 4]", Error);
  CHECK_THROWS_WITH_AS(rope(x, table, table, ids({0})), "rope: positions I32 [1] for 2 tokens",
                       Error);
  CHECK_THROWS_WITH_AS(rope(x, table, table, zeros({2})), "rope: positions F32 [2] for 2 tokens",
                       Error);
  CHECK_THROWS_WITH_AS(rope(x, table, table, ids({0, 8})), "rope: position 8 beyond the table's 8",
                       Error);
  CHECK_THROWS_WITH_AS(rope(x, table, table, ids({-1, 0})),
                       "rope: position -1 beyond the table's 8", Error);
}

TEST_CASE("look-ups and losses name the index that is outside") {
  CHECK_THROWS_WITH_AS(embedding(zeros({4, 2}), ids({0, 4})),
                       "embedding: id 4 outside the vocabulary of 4", Error);
  CHECK_THROWS_WITH_AS(embedding(zeros({4, 2}), ids({-1})),
                       "embedding: id -1 outside the vocabulary of 4", Error);
  CHECK_THROWS_WITH_AS(embedding(zeros({4, 2}), zeros({1})), "embedding: table [4, 2] with F32 ids",
                       Error);
  CHECK_THROWS_WITH_AS(cross_entropy(zeros({2, 5}), ids({0, 5})),
                       "cross_entropy: target 5 outside the 5 classes", Error);
  CHECK_THROWS_WITH_AS(cross_entropy(zeros({2, 5}), ids({0, -2})),
                       "cross_entropy: target -2 outside the 5 classes", Error);
  CHECK_THROWS_WITH_AS(cross_entropy(zeros({2, 5}), ids({0})),
                       "cross_entropy: logits [2, 5] and targets I32 [1]", Error);
  CHECK_THROWS_WITH_AS(cross_entropy(zeros({1, 0}), ids({0})),
                       "cross_entropy: logits [1, 0] have no classes", Error);
  CHECK_THROWS_WITH_AS(mse(zeros({2}), zeros({3})), "mse: shapes [2] and [3] differ", Error);
}

TEST_CASE("cross-entropy is the known number, and an ignored row counts nothing") {
  const Tensor x = parameter(Tensor::from<float>({0, 0, 0, 0, /**/ 1, 2, 3, 4}, {2, 4}));
  const Tensor loss = cross_entropy(x, ids({1, -1}));
  CHECK(loss.to_vector<float>()[0] == doctest::Approx(std::log(4.0)).epsilon(1e-7));
  CHECK(loss.to_vector<float>()[1] == 0.0f);
  const Tensor g = backward(sum(loss))[x];
  CHECK(within(g, Tensor::from<float>({0.25f, -0.75f, 0.25f, 0.25f, 0, 0, 0, 0}, {2, 4}), 1e-7));
  const Tensor large = Tensor::from<float>({1e4f, -1e4f, 0}, {1, 3});  // no overflow
  CHECK(cross_entropy(large, ids({1})).to_vector<float>()[0] == doctest::Approx(2e4));
}

}  // namespace omq
