// Packed weights on every device present: the same numbers as the CPU's to the last bit where they
// are unpacked, products within the rounding of x to 16 bits, and the fused stages of decoding
// against the products they are made of.
#include <doctest/doctest.h>

#include <cmath>

#include "tensor/decode_kernels.h"
#include "tests/support/device_packed.h"

namespace omq {
namespace {

// Every width, groups of every unit, matrices that fill no panel.
template <class F> void for_packed(F&& body) {
  on_devices(1, [&](Rng& rng, Device d) {
    for (const int bits : {2, 3, 4, 8})
      for (const int64_t group : {0, 32, 64, 128, 256}) {
        const bool symmetric = rng.coin();
        const int64_t step = group > 0 ? 32 : 1;
        const int64_t cols = rng.between(1, 20) * (group > 0 ? 32 : 8) + (step == 1 ? 4 : 0);
        const int64_t rows = rng.between(1, 90);
        CAPTURE(bits);
        CAPTURE(group);
        CAPTURE(symmetric);
        CAPTURE(rows);
        CAPTURE(cols);
        body(rng, d, rows, cols,
             GroupSpec{.bits = bits, .group_size = group, .symmetric = symmetric});
      }
  });
}

// As signed bytes where a GPU is to multiply many rows.
QuantizedRows codes_of(const Tensor& x, RowQuant s, Device d) {
  const bool as_signed = d.type != DeviceType::CPU && x.dim(0) > kFewRows;
  QuantizedRows q{.codes = Tensor::empty(x.shape(), as_signed ? DType::I8 : DType::U8, d),
                  .sums = as_signed ? Tensor::empty({x.dim(0)}, DType::I32, d) : Tensor{},
                  .grid = Tensor::empty({x.dim(0), 2}, DType::F32, d),
                  .spec = s,
                  .cols = x.dim(1),
                  .paired = false};
  packed_on(q.grid).quantize_rows(q, uploaded(x, d));
  return q;
}

// Sums by row are those of the codes, where there are any.
bool sums_fit(const QuantizedRows& q) {
  if (!q.as_signed()) return true;
  const std::vector<double> codes = values(q.codes), sums = values(q.sums);
  for (size_t row = 0, i = 0; row < sums.size(); ++row) {
    double sum = 0;
    for (int64_t col = 0; col < q.cols; ++col) sum += codes[i++];
    if (sum != sums[row]) return false;
  }
  return true;
}

// Codes and grids of `got` are those of `want`, which are unsigned.
void check_codes(const QuantizedRows& got, const QuantizedRows& want) {
  CHECK(bit_equal(got.grid, want.grid));
  CHECK(sums_fit(got));
  if (!got.as_signed()) {
    CHECK(bit_equal(got.codes, want.codes));
    return;
  }
  std::vector<double> codes = values(got.codes);
  for (double& c : codes) c += signed_offset(got.spec.bits);
  CHECK(codes == values(want.codes));
}

}  // namespace

TEST_CASE("devices: packed weights unpack to the CPU's numbers") {
  for_packed([](Rng& rng, Device d, int64_t rows, int64_t cols, GroupSpec spec) {
    const Packed w = random_packed(rng, rows, cols, spec, d);
    REQUIRE(w.device.data.defined());
    Tensor want = floats({rows, cols}), got = floats({rows, cols}, d);
    cpu::packed_dequantize(want, w.cpu);
    packed_on(got).packed_dequantize(got, w.device);
    CHECK(bit_equal(got, want));
    if (d.type != DeviceType::CPU) {  // products of many rows ask for halves
      Guarded halves({rows, cols}, DType::F16, d);
      Tensor want_halves = Tensor::empty({rows, cols}, DType::F16);
      cpu::copy(want_halves, want);
      packed_on(got).packed_dequantize(halves.tensor, w.device);
      CHECK(bit_equal(halves.tensor, want_halves));
      CHECK(halves.untouched());
    }
    std::vector<int32_t> chosen;
    for (int i = 0; i < 5; ++i) chosen.push_back(static_cast<int32_t>(rng.between(0, rows - 1)));
    const Tensor ids = Tensor::from<int32_t>(chosen, {5});
    Tensor want_rows = floats({5, cols}), got_rows = floats({5, cols}, d);
    cpu::packed_embedding(want_rows, w.cpu, ids);
    packed_on(got_rows).packed_embedding(got_rows, w.device, uploaded(ids, d));
    CHECK(bit_equal(got_rows, want_rows));
  });
}

TEST_CASE("devices: groups that fall into no unit are left to dense weights") {
  on_devices(1, [](Rng& rng, Device d) {
    const Packed w = random_packed(rng, 16, 96, {.bits = 4, .group_size = 48}, d);
    CHECK(w.device.data.defined() == (d.type == DeviceType::CPU));
  });
}

TEST_CASE("devices: products with packed weights, few rows and many") {
  for_packed([](Rng& rng, Device d, int64_t rows, int64_t cols, GroupSpec spec) {
    const Packed w = random_packed(rng, rows, cols, spec, d);
    for (const int64_t m : {1, 3, 5, 8, 11, 16, 40}) {
      CAPTURE(m);
      const Tensor x = random_tensor(rng, {m, cols}, DType::F32, -2, 2);
      Tensor want = floats({m, rows}), dense = floats({rows, cols});
      cpu::packed_dequantize(dense, w.cpu);
      cpu::dense_matmul(want, x, dense);
      on_both_paths(d, [&] {
        Guarded got({m, rows}, DType::F32, d);
        packed_on(got.tensor).packed_matmul(got.tensor, uploaded(x, d), w.device);
        CHECK(close(got.tensor, want, kRounded));
        CHECK(got.untouched());
      });
    }
  });
}

TEST_CASE("devices: one row and several as wide as a large model's") {
  on_devices(1, [](Rng& rng, Device d) {
    for (const int bits : {2, 3, 4, 8}) {
      CAPTURE(bits);
      constexpr int64_t kRows = 16;
      for (const int64_t cols : all_or_few({11008, 28672}, {11008})) {  // LLaMA-7B's and 70B's
        CAPTURE(cols);
        const Packed w = random_packed(rng, kRows, cols, {.bits = bits, .group_size = 128}, d);
        Tensor dense = floats({kRows, cols});
        cpu::packed_dequantize(dense, w.cpu);
        const Tensor half = converted(dense, DType::F16);
        for (const int64_t m : all_or_few({1, 4, 5, 8, 11, 16}, {1, 5, 16})) {
          CAPTURE(m);
          const Tensor x = random_tensor(rng, {m, cols}, DType::F32, -2, 2);
          Tensor want = floats({m, kRows}), got = floats({m, kRows}, d);
          cpu::dense_matmul(want, x, dense);
          packed_on(got).packed_matmul(got, uploaded(x, d), w.device);
          CHECK(close(got, want, kRounded));
          cpu::dense_matmul(want, x, half);
          packed_on(got).dense_matmul(got, uploaded(x, d), uploaded(half, d));
          CHECK(close(got, want, 1e-10));
        }
      }
    }
  });
}

TEST_CASE("devices: matrices of more rows than are summed at a time, and of wide ones") {
  on_devices(1, [](Rng& rng, Device d) {
    const DecodeKernels* kernels = decode_kernels(d);
    if (!kernels) return;
    struct Size {
      int64_t rows, cols;
      GroupSpec spec;
    };
    for (const Size& size : {Size{40000, 96, {.bits = 4, .group_size = 32}},
                             Size{40003, 128, {.bits = 3, .group_size = 64}},  // y is not aligned
                             Size{1107, 11008, {.bits = 2, .group_size = 128}}})
      for (const int64_t m : all_or_few({1, 3, 4, 5, 16}, {1, 4})) {
        CAPTURE(size.rows);
        CAPTURE(m);
        const int64_t K = size.cols;
        const Tensor x = random_tensor(rng, {m, K}, DType::F32, -2, 2),
                     gain = random_tensor(rng, {K}, DType::F32, 0.5, 1.5);
        Tensor normed = floats(x.shape());
        cpu::rms_norm(normed, x, gain, {}, 1e-5);
        std::vector<RowMatrix> packed, dense, plain;
        for (int i = 0; i < 2; ++i) {
          const Packed w = random_packed(rng, size.rows, K, size.spec, d);
          const Tensor bias = random_tensor(rng, {size.rows}, DType::F32, -1, 1);
          Tensor values = floats({size.rows, K});
          cpu::packed_dequantize(values, w.cpu);
          packed.push_back({w.device, uploaded(bias, d)});
          dense.push_back({uploaded(converted(values, DType::F16), d), uploaded(bias, d)});
          plain.push_back({values, bias});
        }
        for (const RowOutput output : {RowOutput::Store, RowOutput::Add, RowOutput::SiluMul}) {
          CAPTURE(static_cast<int>(output));
          const size_t count = output == RowOutput::Add ? 1 : 2;
          const int64_t columns = output == RowOutput::Store ? 2 * size.rows : size.rows;
          const Tensor before = random_tensor(rng, {m, columns}, DType::F32, -1, 1);
          Tensor want = converted(before, DType::F32);
          RowProducts reference({plain.begin(), plain.begin() + static_cast<int64_t>(count)},
                                output, std::nullopt);
          for (int64_t i = 0; i < m; ++i)
            reference(normed.alias({1, K}, {K, 1}, i * K), want.data<float>() + i * columns);
          for (const auto& matrices : {packed, dense}) {
            const DecodeInput in{.x = uploaded(x, d), .gain = uploaded(gain, d), .eps = 1e-5};
            Guarded got({m, columns}, DType::F32, d);
            Tensor again = uploaded(before, d);
            on(again).copy(got.tensor, again);
            kernels->products(got.tensor, in, std::span(matrices).first(count), output, {});
            kernels->products(again, in, std::span(matrices).first(count), output, {});
            CHECK(close(got.tensor, want, kRounded));
            CHECK(got.untouched());
            CHECK(bit_equal(got.tensor, again));
          }
        }
      }
  });
}

TEST_CASE("devices: rows of dense products may be large, and spoil themselves alone") {
  on_devices(1, [](Rng& rng, Device d) {
    for (const DType type : {DType::F16, DType::BF16})
      for (const int64_t m : {2, 7, 16}) {
        CAPTURE(m);
        constexpr int64_t kCols = 264, kRows = 35;
        Tensor x = random_tensor(rng, {m, kCols}, DType::F32, -1e6, 1e6);  // beyond F16
        x.data<float>()[3] = 1e30f;
        for (int64_t c = 128; c < 256; ++c) x.data<float>()[kCols + c] = 0;
        const Tensor w = random_tensor(rng, {kRows, kCols}, type, -1, 1);
        Tensor want = floats({m, kRows});
        cpu::dense_matmul(want, x, w);
        Tensor got = floats({m, kRows}, d);
        packed_on(got).dense_matmul(got, uploaded(x, d), uploaded(w, d));
        for (int64_t i = 0; i < m; ++i) {
          CAPTURE(i);
          const auto row = [&](const Tensor& t) {
            return converted(t, DType::F32).alias({kRows}, {1}, i * kRows);
          };
          CHECK(close(row(got), row(want), 1e-10));
        }
        for (const float bad : {INFINITY, NAN}) {
          x.data<float>()[kCols + 200] = bad;
          Tensor spoiled = floats({m, kRows}, d);
          packed_on(spoiled).dense_matmul(spoiled, uploaded(x, d), uploaded(w, d));
          const std::vector<double> was = values(got), is = values(spoiled);
          bool same = true, spoilt = true;
          for (size_t i = 0; i < is.size(); ++i)
            if (i / kRows == 1)
              spoilt = spoilt && !std::isfinite(is[i]);
            else
              same = same && is[i] == was[i];
          CHECK(same);
          CHECK(spoilt);
        }
      }
  });
}

TEST_CASE("devices: rows that the smallest GPUs cannot hold are multiplied all the same") {
  on_devices(1, [](Rng& rng, Device d) {
    const PlainPath plain(d);
    for (const int64_t cols : {11008, 28672}) {  // LLaMA-7B's and 70B's widest
      CAPTURE(cols);
      constexpr int64_t kRows = 32;
      const Packed w = random_packed(rng, kRows, cols, {.bits = 4, .group_size = 128}, d);
      const Tensor x = random_tensor(rng, {2, cols}, DType::F32, -2, 2);
      Tensor want = floats({2, kRows}), dense = floats({kRows, cols}), got = floats({2, kRows}, d);
      cpu::packed_dequantize(dense, w.cpu);
      cpu::dense_matmul(want, x, dense);
      packed_on(got).packed_matmul(got, uploaded(x, d), w.device);
      CHECK(close(got, want, kRounded));
    }
  });
}

TEST_CASE("devices: products of codes with codes") {
  for_packed([](Rng& rng, Device d, int64_t rows, int64_t cols, GroupSpec spec) {
    const Packed w = random_packed(rng, rows, cols, spec, d);
    for (const int bits : {4, 8})
      for (const int64_t m : {1, 5, 33}) {
        CAPTURE(m);
        const Tensor x = random_tensor(rng, {m, cols}, DType::F32, -2, 3);
        const QuantizedRows want_x = codes_of(x, {.bits = bits}, {}),
                            got_x = codes_of(x, {.bits = bits}, d);
        check_codes(got_x, want_x);
        Tensor want = floats({m, rows}), got = floats({m, rows}, d);
        cpu::packed_matmul_rows(want, want_x, w.cpu);
        packed_on(got).packed_matmul_rows(got, got_x, w.device);
        // Whole numbers are exact in 16 bits; scaled weights of a group are rounded for many rows.
        CHECK(close(got, want, m > 16 ? kRounded : 1e-11));
      }
  });
}

TEST_CASE("devices: many rows of codes are multiplied exactly, in 16 bits too") {
  on_devices(1, [](Rng& rng, Device d) {
    for (const int bits : {2, 3, 4, 8})
      for (const int x_bits : {4, 6, 8})
        for (const int64_t cols : {64, 176, 4096}) {
          CAPTURE(bits);
          CAPTURE(x_bits);
          CAPTURE(cols);
          constexpr int64_t kRows = 48, kMany = 37;
          const Packed w = random_packed(rng, kRows, cols, {.bits = bits}, d);
          Tensor halves = Tensor::empty({kMany, cols}, DType::F16);
          cpu::copy(halves, random_tensor(rng, {kMany, cols}, DType::F32, -2, 3));
          Tensor x = floats({kMany, cols});
          cpu::copy(x, halves);
          const QuantizedRows want_x = codes_of(x, {.bits = x_bits}, {}),
                              got_x = codes_of(d.type == DeviceType::CPU ? x : halves,
                                               {.bits = x_bits}, d);
          check_codes(got_x, want_x);
          Tensor want = floats({kMany, kRows});
          cpu::packed_matmul_rows(want, want_x, w.cpu);
          Guarded got({kMany, kRows}, DType::F32, d);
          packed_on(got.tensor).packed_matmul_rows(got.tensor, got_x, w.device);
          CHECK(close(got.tensor, want, 1e-11));
          CHECK(got.untouched());
          if (d.type == DeviceType::CPU) continue;
          Guarded narrow({kMany, kRows}, DType::F16, d);
          packed_on(narrow.tensor).packed_matmul_rows(narrow.tensor, got_x, w.device);
          CHECK(close(narrow.tensor, want, kRounded));
          CHECK(narrow.untouched());
        }
  });
}

TEST_CASE("devices: two products of codes become one gated one") {
  on_devices(1, [](Rng& rng, Device d) {
    for (const int bits : {4, 8})
      for (const int64_t group : {0, 64})  // groups are multiplied one product after the other
        for (const int64_t m : {3, 37}) {
          CAPTURE(bits);
          CAPTURE(group);
          CAPTURE(m);
          constexpr int64_t kRows = 48, kCols = 192;
          const GroupSpec spec{.bits = bits, .group_size = group};
          const Packed gate = random_packed(rng, kRows, kCols, spec, d),
                       up = random_packed(rng, kRows, kCols, spec, d);
          const Tensor x = random_tensor(rng, {m, kCols}, DType::F32, -0.2, 0.3);
          const QuantizedRows want_x = codes_of(x, {.bits = 8}, {}),
                              got_x = codes_of(x, {.bits = 8}, d);
          Tensor left = floats({m, kRows}), right = floats({m, kRows}), want = floats({m, kRows});
          cpu::packed_matmul_rows(left, want_x, gate.cpu);
          cpu::packed_matmul_rows(right, want_x, up.cpu);
          cpu::silu_mul(want, left, right);
          const auto check_as = [&](DType type, double tolerance) {
            Guarded got({m, kRows}, type, d);
            packed_on(got.tensor).packed_gated_rows(got.tensor, got_x, gate.device, up.device);
            CHECK(close(got.tensor, want, tolerance));
            CHECK(got.untouched());
          };
          check_as(DType::F32, m > kFewRows && group > 0 ? kRounded : 1e-5);
          if (d.type != DeviceType::CPU && m > kFewRows) check_as(DType::F16, kRounded);
        }
  });
}

TEST_CASE("devices: products with dense weights of every type") {
  on_devices(4, [](Rng& rng, Device d) {
    for (const DType type : {DType::F32, DType::F16, DType::BF16})
      for (const int64_t m : {1, 4, 8, 20}) {
        const int64_t cols = rng.between(1, 40) * (rng.coin() ? 8 : 1), rows = rng.between(1, 70);
        CAPTURE(cols);
        CAPTURE(rows);
        const Tensor x = random_tensor(rng, {m, cols}, DType::F32, -2, 2);
        const Tensor w = random_tensor(rng, {rows, cols}, type, -1, 1);
        Tensor want = floats({m, rows});
        cpu::dense_matmul(want, x, w);
        on_both_paths(d, [&] {
          Guarded got({m, rows}, DType::F32, d);
          packed_on(got.tensor).dense_matmul(got.tensor, uploaded(x, d), uploaded(w, d));
          CHECK(close(got.tensor, want, m > 16 && type != DType::F32 ? kRounded : 1e-11));
          CHECK(got.untouched());
        });
      }
  });
}

TEST_CASE("devices: rows become codes and come back as on the CPU") {
  on_devices(6, [](Rng& rng, Device d) {
    for (const int bits : {2, 4, 7, 8}) {
      const int64_t cols = rng.between(1, 200);
      Tensor x = random_tensor(rng, {3, 2, cols}, DType::F32, -3, 2);
      if (rng.coin()) x.data<float>()[cols] = INFINITY;
      for (const bool paired : {false, true}) {
        if (paired && bits > 4) continue;
        const auto rows_on = [&](Device where) {
          QuantizedRows q{
              .codes = {}, .grid = {}, .spec = {.bits = bits}, .cols = cols, .paired = paired};
          q.codes = Tensor::empty({3, 2, q.code_bytes()}, DType::U8, where);
          q.grid = Tensor::empty({3, 2, 2}, DType::F32, where);
          packed_on(q.grid).quantize_rows(q, uploaded(x, where));
          return q;
        };
        const QuantizedRows want = rows_on({}), got = rows_on(d);
        CHECK(bit_equal(got.codes, want.codes));
        Tensor back_want = floats(x.shape()), back_got = floats(x.shape(), d);
        cpu::dequantize_rows(back_want, want);
        packed_on(back_got).dequantize_rows(back_got, got);
        for (int64_t i = 0; i < x.numel(); ++i) {
          const double a = values(back_want)[static_cast<size_t>(i)],
                       b = values(back_got)[static_cast<size_t>(i)];
          if (!(a == b || (std::isnan(a) && std::isnan(b)))) FAIL("element " << i);
        }
      }
    }
  });
}

TEST_CASE("devices: stages of decoding are the products they are made of") {
  on_devices(3, [](Rng& rng, Device d) {
    const DecodeKernels* kernels = decode_kernels(d);
    if (!kernels) return;
    const int64_t K = 32 * rng.between(1, 9);
    const auto vector = [&](int64_t n, double lo, double hi) {
      return random_tensor(rng, {n}, DType::F32, lo, hi);
    };
    for (const bool packed : {true, false})
      for (const bool quantised : {false, true})
        for (const RowOutput output : {RowOutput::Store, RowOutput::Add, RowOutput::SiluMul}) {
          CAPTURE(packed);
          CAPTURE(quantised);
          CAPTURE(static_cast<int>(output));
          const int64_t m = rng.coin() ? 1 : rng.between(2, 16),
                        n = 16 * rng.between(1, 6) + (packed ? 3 : 0);
          const size_t count = output == RowOutput::Store ? 3 : output == RowOutput::Add ? 1 : 2;
          const GroupSpec spec{.bits = static_cast<int>(rng.between(2, 4)), .group_size = 32};
          std::vector<RowMatrix> cpu, gpu;
          int64_t columns = 0;
          for (size_t i = 0; i < count; ++i) {
            const int64_t rows = output == RowOutput::Store ? n + 16 * static_cast<int64_t>(i) : n;
            const Tensor bias = rng.coin() ? vector(rows, -1, 1) : Tensor{};
            RowMatrix a{Tensor{}, bias}, b{Tensor{}, bias.defined() ? uploaded(bias, d) : Tensor{}};
            if (packed) {
              const Packed w = random_packed(rng, rows, K, spec, d);
              a.weight = w.cpu, b.weight = w.device;
            } else {
              const Tensor w = random_tensor(rng, {rows, K}, DType::F16, -1, 1);
              a.weight = w, b.weight = uploaded(w, d);
            }
            cpu.push_back(a), gpu.push_back(b);
            columns += rows;
          }
          if (output == RowOutput::SiluMul) columns = n;
          const Tensor x = random_tensor(rng, {m, K}, DType::F32, -2, 2),
                       gain = vector(K, 0.5, 1.5),
                       shift = rng.coin() ? vector(K, -0.2, 0.2) : Tensor{},
                       before = random_tensor(rng, {m, columns}, DType::F32, -1, 1);
          const std::optional<RowQuant> quant =
              quantised ? std::optional(RowQuant{.bits = 8}) : std::nullopt;
          Tensor normed = floats(x.shape()), want = converted(before, DType::F32);
          cpu::rms_norm(normed, x, gain, shift, 1e-5);
          RowProducts reference(cpu, output, quant);
          for (int64_t i = 0; i < m; ++i)
            reference(normed.alias({1, K}, {K, 1}, i * K), want.data<float>() + i * columns);
          Tensor got = uploaded(before, d);
          kernels->products(got,
                            {.x = uploaded(x, d),
                             .gain = uploaded(gain, d),
                             .shift = shift.defined() ? uploaded(shift, d) : Tensor{},
                             .eps = 1e-5,
                             .quant = quant},
                            gpu, output, {});
          // A code at a rounding boundary may fall the other way: 1/255 of a value in one place.
          CHECK(close(got, want, quantised ? 1e-5 : kRounded));
        }
  });
}

}  // namespace omq
