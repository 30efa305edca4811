// Products of one row, several matrices at a time: bit for bit what the kernels give one by one.
#include "tensor/row_products.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <optional>

#include "tensor/isa.h"
#include "tensor/kernels.h"
#include "tensor/parallel.h"
#include "tests/support/close.h"
#include "tests/support/property.h"
#include "tests/support/restore.h"

namespace omq {
namespace {

PackedInt random_packed(Rng& rng, int64_t rows, int64_t cols, GroupSpec spec) {
  Tensor codes = Tensor::empty({rows, cols}, DType::U8);
  for (int64_t i = 0; i < codes.numel(); ++i)
    codes.data<uint8_t>()[i] = static_cast<uint8_t>(rng.between(0, spec.max_code()));
  const Shape grid{rows, spec.groups(cols)};
  Tensor scale = Tensor::empty(grid, DType::F32), zero = Tensor::empty(grid, DType::F32);
  for (int64_t i = 0; i < scale.numel(); ++i) {
    scale.data<float>()[i] = static_cast<float>(rng.between(1, 64)) / 1024;  // exact in f16
    zero.data<float>()[i] = static_cast<float>(rng.between(0, spec.max_code()));
  }
  return pack_codes(codes, scale, zero, spec);
}

// W x + b by the kernels that take many rows.
Tensor reference(const RowMatrix& m, const Tensor& x, const std::optional<RowQuant>& input) {
  Tensor row = x;
  if (input) {
    row = Tensor::empty(x.shape(), DType::F32);
    cpu::fake_quant_rows(row, x, *input);
  }
  Tensor y;
  if (const auto* w = std::get_if<PackedInt>(&m.weight)) {
    y = Tensor::empty({1, w->rows}, DType::F32);
    if (input && input->include_zero) {
      QuantizedRows q{.codes = Tensor::empty(x.shape(), DType::U8),
                      .grid = Tensor::empty({1, 2}, DType::F32),
                      .spec = *input,
                      .cols = x.dim(1)};
      cpu::quantize_rows(q, x);
      cpu::packed_matmul_rows(y, q, *w);
    } else {
      cpu::packed_matmul(y, row, *w);
    }
  } else {
    const auto& dense = std::get<Tensor>(m.weight);
    y = Tensor::empty({1, dense.dim(0)}, DType::F32);
    cpu::dense_matmul(y, row, dense);
  }
  if (m.bias.defined())
    for (int64_t i = 0; i < y.numel(); ++i) y.data<float>()[i] += m.bias.data<float>()[i];
  return y;
}

Tensor joined(const std::vector<Tensor>& parts) {
  std::vector<float> all;
  for (const Tensor& t : parts)
    for (const float v : t.to_vector<float>()) all.push_back(v);
  return Tensor::from<float>(all, {static_cast<int64_t>(all.size())});
}

void check_all_outputs(const std::vector<RowMatrix>& matrices, const Tensor& x,
                       const std::optional<RowQuant>& input) {
  std::vector<Tensor> each;
  for (const RowMatrix& m : matrices) each.push_back(reference(m, x, input));
  const Tensor want = joined(each);
  RowProducts store(matrices, RowOutput::Store, input);
  CHECK(store.rows() == want.numel());
  CHECK(store.cols() == x.dim(1));
  Tensor y = Tensor::full({store.rows()}, 77.0);
  for (int repeat = 0; repeat < 2; ++repeat) {
    store(x, y.data<float>());
    CHECK(bit_equal(y, want));
  }
  RowProducts add({matrices[0]}, RowOutput::Add, input);
  Tensor sum = Tensor::full({add.rows()}, 0.5), wanted = Tensor::full({add.rows()}, 0.5);
  add(x, sum.data<float>());
  for (int64_t i = 0; i < add.rows(); ++i) wanted.data<float>()[i] += each[0].data<float>()[i];
  CHECK(bit_equal(sum, wanted));
  RowProducts gated({matrices[0], matrices[1]}, RowOutput::SiluMul, input);
  Tensor g = Tensor::full({gated.rows()}, 77.0),
         by_kernel = Tensor::empty({1, add.rows()}, DType::F32);
  gated(x, g.data<float>());
  cpu::silu_mul(by_kernel, each[0], each[1]);
  CHECK(bit_equal(g, by_kernel.alias({add.rows()}, {1})));
}

const std::optional<RowQuant> kInputs[] = {std::nullopt, RowQuant{.bits = 8}, RowQuant{.bits = 4},
                                           RowQuant{.bits = 4, .include_zero = false}};

}  // namespace

TEST_CASE("row products: every width, grouping, input and instruction set, as the kernels") {
  const Restore restore;
  for (const char* isa : packed_isas_here()) {
    CAPTURE(std::string(isa));
    REQUIRE(force_packed_isa(isa));
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      Rng rng(5);
      for (const int bits : {2, 3, 4, 8})
        for (const int64_t group : {0, 32, 64})
          for (const auto& input : kInputs) {
            CAPTURE(bits);
            CAPTURE(group);
            const int64_t cols = 136;
            const GroupSpec spec{.bits = bits, .group_size = group, .symmetric = bits == 3};
            const Tensor bias = normal_tensor(rng, {217}, DType::F32);
            const Tensor x = normal_tensor(rng, {1, cols}, DType::F32);
            // The third is grouped differently: its row of x is prepared for itself.
            check_all_outputs({{random_packed(rng, 217, cols, spec), {}},
                               {random_packed(rng, 217, cols, spec), bias},
                               {random_packed(rng, 40, cols, {.bits = 4, .group_size = 48}), {}}},
                              x, input);
          }
    }
  }
}

TEST_CASE("row products: dense matrices, beside packed ones too") {
  Rng rng(6);
  const Tensor x = normal_tensor(rng, {1, 72}, DType::F32);
  for (const DType type : {DType::F32, DType::BF16, DType::F16})
    for (const auto& input : kInputs) {
      CAPTURE(dtype_name(type));
      const Tensor a = normal_tensor(rng, {70, 72}, type), b = normal_tensor(rng, {70, 72}, type);
      check_all_outputs({{a, normal_tensor(rng, {70}, DType::F32)},
                         {b, {}},
                         {random_packed(rng, 33, 72, {.bits = 4, .group_size = 32}), {}}},
                        x, input);
    }
}

TEST_CASE("row products: several rows at once are each row alone") {
  const Restore restore;
  for (const char* isa : packed_isas_here()) {
    CAPTURE(std::string(isa));
    REQUIRE(force_packed_isa(isa));
    set_num_threads(3);
    Rng rng(9);
    constexpr int64_t kCols = 136, kRows = 217;
    for (const int bits : {2, 3, 4, 8, 16})
      for (const auto& input : kInputs)
        for (const int64_t batch : {2, 3, 5, 16}) {
          CAPTURE(bits);
          CAPTURE(batch);
          const auto matrix = [&](int64_t rows) -> RowMatrix {
            const Tensor bias = normal_tensor(rng, {rows}, DType::F32);
            if (bits == 16) return {normal_tensor(rng, {rows, kCols}, DType::F16), bias};
            return {random_packed(rng, rows, kCols, {.bits = bits, .group_size = 64}), bias};
          };
          const Tensor x = normal_tensor(rng, {batch, kCols}, DType::F32);
          const std::vector<RowMatrix> all{matrix(kRows), matrix(40)}, one{matrix(kRows)},
              pair{matrix(kRows), matrix(kRows)};
          for (const auto& [matrices, output] :
               {std::pair{&all, RowOutput::Store}, std::pair{&one, RowOutput::Add},
                std::pair{&pair, RowOutput::SiluMul}}) {
            RowProducts together(*matrices, output, input, batch), alone(*matrices, output, input);
            const int64_t n = alone.rows();
            CHECK(together.rows() == n);
            Tensor got = Tensor::full({batch * n}, 0.5), want = Tensor::full({batch, n}, 0.5);
            together(x, got.data<float>());
            for (int64_t i = 0; i < batch; ++i)
              alone(x.alias({1, kCols}, {kCols, 1}, i * kCols), want.data<float>() + i * n);
            // Stored products stand matrix by matrix.
            const int64_t first = output == RowOutput::Store ? kRows : n;
            int64_t different = 0;
            for (int64_t i = 0; i < batch; ++i)
              for (int64_t j = 0; j < n; ++j) {
                const int64_t at =
                    j < first ? i * first + j : batch * first + i * (n - first) + j - first;
                different += got.data<float>()[at] != want.data<float>()[i * n + j];
              }
            CHECK(different == 0);
          }
        }
  }
}

TEST_CASE("row products: a value that is not finite shows") {
  Rng rng(7);
  Tensor x = normal_tensor(rng, {1, 64}, DType::F32);
  x.data<float>()[9] = std::numeric_limits<float>::infinity();
  for (const auto& input : kInputs) {
    if (input && !input->include_zero) continue;  // the official range bounds its scale
    RowProducts p({{random_packed(rng, 16, 64, {.bits = 4}), {}}}, RowOutput::Store, input);
    std::vector<float> y(16);
    p(x, y.data());
    for (const float v : y) CHECK_FALSE(std::isfinite(v));
  }
}

TEST_CASE("row products: what does not fit is refused") {
  Rng rng(8);
  const auto message = [](auto&& f) -> std::string {
    try {
      f();
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  const PackedInt w = random_packed(rng, 16, 64, {.bits = 4});
  const Tensor d = Tensor::zeros({8, 32});
  CHECK(message([&] { RowProducts({}, RowOutput::Store); }) == "row products: no matrix");
  CHECK(message([&] {
          RowProducts({{w, {}}, {w, {}}}, RowOutput::Add);
        }) == "row products: Add takes one matrix");
  CHECK(message([&] {
          RowProducts({{w, {}}, {d, {}}}, RowOutput::Store);
        }) == "row products: matrices of 64 and 32 columns");
  CHECK(message([&] {
          RowProducts({{w, {}}}, RowOutput::SiluMul);
        }) == "row products: SiluMul takes two matrices of one size");
  CHECK(message([&] {
          RowProducts({{w, Tensor::zeros({15})}}, RowOutput::Store);
        }) == "row products: a bias [15] for 16 rows");
  RowProducts p({{w, {}}}, RowOutput::Store);
  float y[16];
  CHECK(message([&] {
          p(Tensor::zeros({1, 32}), y);
        }) == "row products: x [1, 32], [1, 64] wanted");
  CHECK(message([&] {
          p(Tensor::zeros({2, 64}), y);
        }) == "row products: x [2, 64], [1, 64] wanted");
  CHECK(message([&] {
          RowProducts({{w, {}}}, RowOutput::Store, {}, 0);
        }) == "row products: 0 rows of x");
}

}  // namespace omq
