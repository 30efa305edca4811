// What a Linear reads where it is made of a gate: codes without the product in memory, on every
// device present.
#include "nn/linear_input.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/device_compare.h"

namespace omq::nn {
namespace {

// Of the codes of each row, as they stand.
Tensor sums_of(const QuantizedRows& q) {
  const std::vector<double> codes = values(q.codes);
  std::vector<int32_t> sums(static_cast<size_t>(q.sums.numel()));
  for (size_t i = 0; i < codes.size(); ++i)
    sums[i / static_cast<size_t>(q.cols)] += static_cast<int32_t>(codes[i]);
  return Tensor::from<int32_t>(sums, q.sums.shape());
}

}  // namespace

TEST_CASE("a gated product becomes codes without being stored") {
  Rng rng(8);
  const RowQuant four{.bits = 4};
  const Tensor up = normal_tensor(rng, {2, 3, 72}, DType::F32);
  Tensor gate = normal_tensor(rng, {2, 3, 72}, DType::F32);
  gate.data<float>()[80] = std::numeric_limits<float>::infinity();  // row 1
  const LinearInput whole(silu_mul(gate, up)), parts = LinearInput::silu_mul(gate, up);
  CHECK(bit_equal(parts.codes(four).codes, whole.codes(four).codes));
  CHECK(std::isnan(parts.codes(four).grid.data<float>()[2]));
  CHECK(std::memcmp(parts.codes(four).grid.raw(), whole.codes(four).grid.raw(),
                    12 * sizeof(float)) == 0);
  CHECK(bit_equal(parts.tensor(), whole.tensor()));
  CHECK(parts.tensor().raw() == parts.tensor().raw());
  CHECK_THROWS_WITH_AS(LinearInput::silu_mul(gate, Tensor::zeros({2, 3, 71})),
                       "silu_mul: gate [2, 3, 72] and up [2, 3, 71] differ", Error);
  const Tensor learned = parameter(up);
  const auto learns = LinearInput::silu_mul(learned, up);
  CHECK(backward(sum(learns.tensor())).contains(learned));
  CHECK_THROWS_WITH_AS(
      learns.codes(four),
      "packed matmul: no gradient goes through packed weights; dequantize() to train", Error);
}

TEST_CASE("devices: a gated product becomes codes as it does by way of memory") {
  on_devices(4, [](Rng& rng, Device d) {
    // 16 rows and fewer have unsigned codes; from 16 384 columns on a block does not hold two
    // tensors.
    for (const int64_t rows : {3, 20})
      for (const int64_t cols :
           {8 * rng.between(1, 40), rng.between(1, 99), int64_t{12'296}, int64_t{16'392}})
        for (const int bits : {4, 8}) {
          CAPTURE(rows);
          CAPTURE(cols);
          CAPTURE(bits);
          Tensor gate = random_tensor(rng, {rows, cols}, DType::F32, -4, 4),
                 up = random_tensor(rng, {rows, cols}, DType::F32, -2, 2);
          const RowQuant s{.bits = bits};
          const QuantizedRows want = quantized(silu_mul(gate, up), s);
          const auto check_as = [&](DType type) {
            const auto in =
                LinearInput::silu_mul(to(uploaded(gate, d), type), to(uploaded(up, d), type));
            const QuantizedRows& got = in.codes(s);
            // A last place of the exponential may move a code, a grid by its last places.
            CHECK(close(dequantized(got), dequantized(want), 1e-3));
            CHECK(got.as_signed() == (d.type != DeviceType::CPU && rows > kFewRows));
            if (got.as_signed()) CHECK(bit_equal(got.sums, sums_of(got)));
          };
          check_as(DType::F32);
          if (d.type != DeviceType::CPU) check_as(DType::F16);
        }
  });
}

}  // namespace omq::nn
