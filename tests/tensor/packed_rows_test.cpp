// Rows of activations as codes, and their product with packed weights in integers.
//
// The grid is fake_quant_rows' own, bit for bit. The product is compared with sums of whole
// numbers: where the scales are 1 it is exact, otherwise within 1e-6 of the sum of its terms'
// sizes; and every instruction set, number of rows and number of threads gives the same bits.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "tensor/isa.h"
#include "tensor/kernels.h"
#include "tensor/numeric.h"
#include "tensor/parallel.h"
#include "tests/support/restore.h"

namespace omq {
namespace {

using Random = std::mt19937;

QuantizedRows empty_rows(const Shape& shape, RowQuant s, bool paired = false) {
  QuantizedRows q{.codes = {}, .grid = {}, .spec = s, .cols = shape.back(), .paired = paired};
  Shape codes = shape, grid = shape;
  codes[codes.n - 1] = q.code_bytes();
  grid[grid.n - 1] = 2;
  q.codes = Tensor::empty(codes, DType::U8);
  q.grid = Tensor::empty(grid, DType::F32);
  return q;
}

Tensor random_floats(const Shape& shape, Random& rng, float shift = 0) {
  std::normal_distribution<float> normal;
  Tensor x = Tensor::empty(shape, DType::F32);
  for (int64_t i = 0; i < x.numel(); ++i) x.data<float>()[i] = normal(rng) + shift;
  return x;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() &&
         std::memcmp(a.raw(), b.raw(), a.nbytes()) == 0;
}

std::string message_of(auto&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// ---- quantising ----

TEST_CASE("quantize_rows and back is fake_quant_rows, bit for bit") {
  Random rng(1);
  for (int bits = 2; bits <= 8; ++bits)
    for (bool include_zero : {true, false})
      for (bool paired : {false, true})
        for (const Shape& shape : {Shape{1, 1}, Shape{5, 7}, Shape{3, 576}, Shape{2, 3, 2, 9}})
          for (float shift : {0.0f, 3.0f, -3.0f}) {
            if (paired && bits > 4) continue;
            CAPTURE(bits);
            CAPTURE(include_zero);
            CAPTURE(paired);
            CAPTURE(shape);
            CAPTURE(shift);
            const RowQuant s{.bits = bits, .include_zero = include_zero};
            const Tensor x = random_floats(shape, rng, shift);
            QuantizedRows q = empty_rows(shape, s, paired);
            cpu::quantize_rows(q, x);
            Tensor back = Tensor::empty(shape, DType::F32),
                   simulated = Tensor::empty(shape, DType::F32);
            cpu::dequantize_rows(back, q);
            cpu::fake_quant_rows(simulated, x, s);
            CHECK(same_bits(back, simulated));
            bool whole = true;
            for (int64_t r = 0; r < q.grid.numel() / 2; ++r)
              whole = whole && q.grid.data<float>()[2 * r + 1] ==
                                   std::nearbyint(q.grid.data<float>()[2 * r + 1]);
            CHECK(whole);
          }
}

TEST_CASE("quantize_silu_mul is silu_mul and quantize_rows, bit for bit") {
  Random rng(5);
  for (const int bits : {2, 4, 8})
    for (const Shape& shape : {Shape{1, 1}, Shape{3, 17}, Shape{2, 5, 40}}) {
      const RowQuant s{.bits = bits};
      const Tensor gate = random_floats(shape, rng), up = random_floats(shape, rng, 0.5f);
      Tensor product = Tensor::empty(shape, DType::F32);
      cpu::silu_mul(product, gate, up);
      QuantizedRows want = empty_rows(shape, s), got = empty_rows(shape, s);
      cpu::quantize_rows(want, product);
      cpu::quantize_silu_mul(got, gate, up);
      CHECK(same_bits(got.codes, want.codes));
      CHECK(same_bits(got.grid, want.grid));
    }
  QuantizedRows q = empty_rows({2, 8}, {});
  CHECK(message_of([&] {
          cpu::quantize_silu_mul(q, Tensor::zeros({2, 8}), Tensor::zeros({2, 7}));
        }) ==
        "quantize_silu_mul: gate [2, 8] and up [2, 7] must be F32, contiguous and of one shape");
  q.sums = Tensor::zeros({2}, DType::I32);
  CHECK(message_of([&] {
          cpu::quantize_rows(q, Tensor::zeros({2, 8}));
        }) == "quantize_rows: signed codes are a GPU's");
}

TEST_CASE("two codes share a byte, the first in its low half") {
  QuantizedRows q = empty_rows({1, 5}, {.bits = 4}, true);
  cpu::quantize_rows(q, Tensor::from<float>({0, 1, 2, 15, 7}, {1, 5}));
  CHECK(q.codes.to_vector<uint8_t>() == std::vector<uint8_t>{0x10, 0xf2, 0x07});
  CHECK(q.grid.to_vector<float>() == std::vector<float>{1, 0});
}

TEST_CASE("rows are written into windows of larger tensors, and nothing beside them") {
  Random rng(2);
  for (bool paired : {false, true}) {
    // Tokens 2 … 4 of 2 sequences of 6, 3 heads of 10.
    const RowQuant s{.bits = 3};
    const Tensor x = random_floats({2, 3, 3, 10}, rng);
    QuantizedRows all = empty_rows({2, 6, 3, 10}, s, paired),
                  alone = empty_rows(x.shape(), s, paired);
    std::memset(all.codes.raw(), 0xee, all.codes.nbytes());
    QuantizedRows window = all;
    const int64_t bytes = all.code_bytes();
    window.codes = all.codes.alias({2, 3, 3, bytes}, all.codes.strides(), 2 * 3 * bytes);
    window.grid = all.grid.alias({2, 3, 3, 2}, all.grid.strides(), 2 * 3 * 2);
    cpu::quantize_rows(window, x);
    cpu::quantize_rows(alone, x);
    const uint8_t *big = all.codes.data<uint8_t>(), *small = alone.codes.data<uint8_t>();
    const int64_t token = 3 * bytes;
    bool inside = true, outside = true;
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t t = 0; t < 6; ++t)
        for (int64_t i = 0; i < token; ++i) {
          const uint8_t got = big[(b * 6 + t) * token + i];
          if (t >= 2 && t < 5)
            inside = inside && got == small[(b * 3 + t - 2) * token + i];
          else
            outside = outside && got == 0xee;
        }
    CHECK(inside);
    CHECK(outside);
    Tensor back = Tensor::empty(x.shape(), DType::F32), want = Tensor::empty(x.shape(), DType::F32);
    cpu::dequantize_rows(back, window);
    cpu::fake_quant_rows(want, x, s);
    CHECK(same_bits(back, want));
  }
}

TEST_CASE("a value that is no number makes its own row none") {
  for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()})
    for (int64_t at : {0, 3, 8}) {
      Tensor x = Tensor::full({2, 9}, 0.5), y = Tensor::empty({2, 9}, DType::F32);
      x.data<float>()[at] = bad;
      QuantizedRows q = empty_rows({2, 9}, {.bits = 8});
      cpu::quantize_rows(q, x);
      cpu::dequantize_rows(y, q);
      for (int64_t i = 0; i < 9; ++i) {
        CHECK(std::isnan(y.data<float>()[i]));
        CHECK(y.data<float>()[9 + i] == doctest::Approx(0.5));
      }
    }
}

TEST_CASE("quantising refuses what does not fit") {
  const Tensor x = Tensor::zeros({2, 6});
  QuantizedRows q = empty_rows({2, 6}, {.bits = 9});
  CHECK(message_of([&] { cpu::quantize_rows(q, x); }) == "quantize_rows: 9 bits, 2 to 8 wanted");
  q = empty_rows({2, 6}, {.bits = 5}, true);
  CHECK(message_of([&] { cpu::quantize_rows(q, x); }) ==
        "quantize_rows: 5 bits, two codes a byte, 2 to 4 wanted");
  q = empty_rows({3, 6}, {.bits = 4});
  CHECK(message_of([&] { cpu::quantize_rows(q, x); }) ==
        "quantize_rows: codes must be U8 [2, 6] with contiguous rows");
  q = empty_rows({2, 6}, {.bits = 4});
  q.grid = Tensor::zeros({2, 3});
  Tensor y = Tensor::zeros({2, 6});
  CHECK(message_of([&] { cpu::dequantize_rows(y, q); }) ==
        "dequantize_rows: the grid must be F32 [2, 2] with contiguous rows");
}

// ---- the product ----

struct Weights {
  Tensor codes, scale, zero;
  GroupSpec spec;
  PackedInt packed;
  int64_t group(int64_t col) const { return col / spec.group_cols(codes.dim(1)); }
  int64_t code(int64_t row, int64_t col) const {
    return codes.data<uint8_t>()[row * codes.dim(1) + col];
  }
  float scale_of(int64_t row, int64_t g) const {
    return scale.data<float>()[row * scale.dim(1) + g];
  }
  int64_t zero_of(int64_t row, int64_t g) const {
    return spec.symmetric ? 1 << (spec.bits - 1)
                          : static_cast<int64_t>(zero.data<float>()[row * zero.dim(1) + g]);
  }
};

Weights pack(Tensor codes, Tensor scale, Tensor zero, GroupSpec spec) {
  const PackedInt packed = pack_codes(codes, scale, zero, spec);
  return {std::move(codes), std::move(scale), std::move(zero), spec, packed};
}

// Every eighth code is one of the ends.
uint8_t random_code(Random& rng, int bits) {
  const unsigned top = (1u << bits) - 1, r = rng();
  return static_cast<uint8_t>(r % 8 == 0 ? (r % 16 == 0 ? top : 0) : (r >> 8) % (top + 1));
}

Weights random_weights(int64_t rows, int64_t cols, GroupSpec spec, Random& rng) {
  const int64_t groups = spec.groups(cols);
  Tensor codes = Tensor::empty({rows, cols}, DType::U8),
         scale = Tensor::empty({rows, groups}, DType::F32),
         zero = Tensor::empty({rows, groups}, DType::F32);
  for (int64_t i = 0; i < codes.numel(); ++i)
    codes.data<uint8_t>()[i] = random_code(rng, spec.bits);
  for (int64_t i = 0; i < scale.numel(); ++i) {
    const float raw = 1e-3f + 1e-5f * static_cast<float>(rng() % 1000);
    scale.data<float>()[i] = f16_bits_to_f32(f32_to_f16_bits(raw));
    zero.data<float>()[i] = random_code(rng, spec.bits);
  }
  return pack(codes, scale, zero, spec);
}

QuantizedRows random_codes(int64_t m, int64_t cols, int bits, Random& rng) {
  QuantizedRows x = empty_rows({m, cols}, {.bits = bits});
  for (int64_t i = 0; i < x.codes.numel(); ++i) x.codes.data<uint8_t>()[i] = random_code(rng, bits);
  for (int64_t i = 0; i < m; ++i) {
    x.grid.data<float>()[2 * i] = 0.01f + 1e-4f * static_cast<float>(rng() % 100);
    x.grid.data<float>()[2 * i + 1] = random_code(rng, bits);
  }
  return x;
}

Tensor product(const QuantizedRows& x, const PackedInt& w) {
  Tensor y = Tensor::full({x.codes.dim(0), w.rows}, std::nan(""));
  cpu::packed_matmul_rows(y, x, w);
  return y;
}

// The largest |y − sum| over Σ |terms|; the sums of a group are whole numbers.
double worst_error(const Tensor& y, const QuantizedRows& x, const Weights& w) {
  const int64_t m = y.dim(0), n = y.dim(1), k = x.cols, groups = w.spec.groups(k);
  const int64_t step = w.spec.group_cols(k);
  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    const double scale = static_cast<double>(x.grid.data<float>()[2 * i]);
    const auto zero = static_cast<int64_t>(x.grid.data<float>()[2 * i + 1]);
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 1e-300;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t dot = 0;
        for (int64_t c = g * step; c < std::min(k, (g + 1) * step); ++c)
          dot += (w.code(j, c) - w.zero_of(j, g)) *
                 (int64_t{x.codes.data<uint8_t>()[i * k + c]} - zero);
        const double term =
            static_cast<double>(dot) * static_cast<double>(w.scale_of(j, g)) * scale;
        sum += term, size += std::abs(term);
      }
      worst =
          std::max(worst, std::abs(static_cast<double>(y.data<float>()[i * n + j]) - sum) / size);
    }
  }
  return worst;
}

TEST_CASE(
    "codes times codes: every width, group and shape, the same bits on every instruction set") {
  Restore restore;
  Random rng(3);
  const std::vector<const char*> isas = packed_isas_here();
  if (std::string_view best = isas.front(); best != "amx" && best != "neon")
    MESSAGE("skipped: the loops of the instruction sets above ", best,
            ", which this processor does not run");
  for (int wbits : {2, 3, 4, 8})
    for (int64_t group : {0, 32, 40, 64, 128})
      for (bool symmetric : {false, true})
        for (auto [rows, cols] :
             {std::pair<int64_t, int64_t>{40, 600}, {17, 7}, {70, 64}, {1, 1}}) {
          const Weights w = random_weights(
              rows, cols, {.bits = wbits, .group_size = group, .symmetric = symmetric}, rng);
          for (int xbits = 2; xbits <= 8; ++xbits) {
            const int64_t m = std::vector<int64_t>{1, 2, 3, 4, 5, 9, 20}[rng() % 7];
            CAPTURE(wbits);
            CAPTURE(group);
            CAPTURE(symmetric);
            CAPTURE(rows);
            CAPTURE(cols);
            CAPTURE(xbits);
            CAPTURE(m);
            const QuantizedRows x = random_codes(m, cols, xbits, rng);
            REQUIRE(force_packed_isa("scalar"));
            const Tensor definition = product(x, w.packed);
            CHECK(worst_error(definition, x, w) < 1e-6);
            for (const char* name : isas) {
              CAPTURE(name);
              REQUIRE(force_packed_isa(name));
              CHECK(same_bits(product(x, w.packed), definition));
            }
          }
        }
}

TEST_CASE("no rows of x give no rows of y, as floats and as codes") {
  Restore restore;
  Random rng(5);
  const Weights w = random_weights(40, 256, {.bits = 4, .group_size = 128}, rng);
  for (const char* name : packed_isas_here()) {
    CAPTURE(name);
    REQUIRE(force_packed_isa(name));
    CHECK(product(random_codes(0, 256, 8, rng), w.packed).shape() == (Shape{0, 40}));
    Tensor y = Tensor::zeros({0, 40});
    CHECK_NOTHROW(cpu::packed_matmul(y, Tensor::zeros({0, 256}), w.packed));
  }
}

TEST_CASE("codes times codes: a row alone is that row among many, on any number of threads") {
  Restore restore;
  Random rng(4);
  for (const char* name : packed_isas_here()) {
    REQUIRE(force_packed_isa(name));
    CAPTURE(name);
    for (int wbits : {2, 3, 4, 8})
      for (int xbits : {4, 8}) {
        const Weights w = random_weights(300, 328, {.bits = wbits, .group_size = 128}, rng);
        const QuantizedRows x = random_codes(37, 328, xbits, rng);
        set_num_threads(1);
        const Tensor all = product(x, w.packed);
        for (int threads : {2, 3}) {
          set_num_threads(threads);
          CHECK(same_bits(product(x, w.packed), all));
        }
        for (int64_t first : {0, 6, 36})
          for (int64_t m : {1, 2, 3, 4, 7}) {
            if (first + m > 37) continue;
            QuantizedRows some = x;
            some.codes = x.codes.alias({m, 328}, {328, 1}, first * 328);
            some.grid = x.grid.alias({m, 2}, {2, 1}, first * 2);
            CAPTURE(first);
            CAPTURE(m);
            CHECK(same_bits(product(some, w.packed), all.alias({m, 300}, {300, 1}, first * 300)));
          }
      }
  }
}

TEST_CASE("codes times codes: wide rows, more rows than one pass, more panels than one task") {
  Restore restore;
  Random rng(9);
  struct Case {
    int64_t rows, cols, group, m;
    int wbits, xbits;
  };
  for (const auto& [rows, cols, group, m, wbits, xbits] :
       {Case{40, 2600, 0, 530, 4, 8}, Case{40, 2600, 128, 530, 4, 8}, Case{40, 2600, 0, 70, 8, 8},
        Case{40, 2600, 0, 70, 8, 6}, Case{2100, 72, 32, 40, 4, 4}, Case{2100, 72, 0, 48, 3, 8},
        Case{2112, 72, 0, 130, 4, 8}}) {
    const Weights w = random_weights(rows, cols, {.bits = wbits, .group_size = group}, rng);
    const QuantizedRows x = random_codes(m, cols, xbits, rng);
    REQUIRE(force_packed_isa("scalar"));
    const Tensor definition = product(x, w.packed);
    for (const char* name : packed_isas_here()) {
      CAPTURE(name);
      CAPTURE(rows);
      CAPTURE(wbits);
      CAPTURE(xbits);
      CAPTURE(group);
      REQUIRE(force_packed_isa(name));
      CHECK(same_bits(product(x, w.packed), definition));
    }
  }
}

// Everything the same: codes of w and their zero point, codes of x and theirs.
void check_constant(int wbits, int64_t w, int64_t wz, int xbits, int64_t x, int64_t xz, int64_t m,
                    int64_t cols) {
  const Tensor one = Tensor::full({16, 1}, 1.0);
  const PackedInt packed =
      pack_codes(Tensor::full({16, cols}, static_cast<double>(w), DType::U8), one,
                 Tensor::full({16, 1}, static_cast<double>(wz)), {.bits = wbits});
  QuantizedRows rows = empty_rows({m, cols}, {.bits = xbits});
  std::memset(rows.codes.raw(), static_cast<int>(x), rows.codes.nbytes());
  for (int64_t i = 0; i < m; ++i) {
    rows.grid.data<float>()[2 * i] = 1;
    rows.grid.data<float>()[2 * i + 1] = static_cast<float>(xz);
  }
  // In chunks of 32768 columns, each of which is exact and then becomes a float.
  float want = 0;
  for (int64_t c = 0; c < cols; c += 32768)
    want += static_cast<float>((w - wz) * (x - xz) * std::min<int64_t>(32768, cols - c));
  CAPTURE(wbits);
  CAPTURE(w);
  CAPTURE(wz);
  CAPTURE(xbits);
  CAPTURE(x);
  CAPTURE(xz);
  CAPTURE(m);
  CAPTURE(cols);
  const Tensor y = product(rows, packed);
  CHECK(*std::min_element(y.data<float>(), y.data<float>() + y.numel()) == want);
  CHECK(*std::max_element(y.data<float>(), y.data<float>() + y.numel()) == want);
}

TEST_CASE("codes times codes: extremes overflow nowhere") {
  Restore restore;
  for (const char* name : packed_isas_here()) {
    CAPTURE(name);
    REQUIRE(force_packed_isa(name));
    for (int wbits : {2, 3, 4, 8})
      for (int xbits : {2, 4, 6, 7, 8}) {
        const int64_t wtop = (1 << wbits) - 1, xtop = (1 << xbits) - 1;
        for (auto [w, wz] : {std::pair{wtop, int64_t{0}}, {int64_t{0}, wtop}, {wtop, wtop / 2}})
          for (auto [x, xz] : {std::pair{xtop, int64_t{0}}, {int64_t{0}, xtop}, {xtop, xtop / 2}})
            for (int64_t m : {1, 13}) check_constant(wbits, w, wz, xbits, x, xz, m, 512);
        for (int64_t m : {1, 13}) {
          check_constant(wbits, wtop, 0, xbits, xtop, 0, m, 40000);
          check_constant(wbits, wtop, 0, xbits, 0, xtop, m, 40000);
        }
      }
  }
}

TEST_CASE("codes times codes: a row that is no number stays alone, zeros are exact") {
  Restore restore;
  Random rng(5);
  const Weights w = random_weights(33, 200, {.bits = 4, .group_size = 64}, rng);
  for (const char* name : packed_isas_here()) {
    CAPTURE(name);
    REQUIRE(force_packed_isa(name));
    for (int64_t m : {2, 12}) {
      Tensor floats = random_floats({m, 200}, rng);
      floats.data<float>()[3] = std::nanf("");
      std::fill_n(floats.data<float>() + 200, 200, 0.0f);
      QuantizedRows x = empty_rows({m, 200}, {.bits = 4});
      cpu::quantize_rows(x, floats);
      const Tensor y = product(x, w.packed);
      for (int64_t j = 0; j < 33; ++j) {
        CHECK(std::isnan(y.data<float>()[j]));
        CHECK(y.data<float>()[33 + j] == 0.0f);
        CHECK(std::isfinite(y.data<float>()[(m - 1) * 33 + j]));
      }
    }
  }
}

TEST_CASE("codes times codes: what does not fit is refused") {
  Random rng(6);
  const Weights w = random_weights(16, 64, {.bits = 4, .group_size = 32}, rng);
  const auto refused = [&](auto&& change) {
    QuantizedRows x = random_codes(1, 64, 8, rng);
    Tensor y = Tensor::empty({1, 16}, DType::F32);
    change(x, y);
    return message_of([&] { cpu::packed_matmul_rows(y, x, w.packed); });
  };
  CHECK(refused([](auto&, auto&) {}) == "");
  CHECK(refused([&](auto& x, auto&) { x = random_codes(1, 63, 8, rng); }) ==
        "packed_matmul_rows: x [1, 63] does not fit w [16, 64]: inner dims differ");
  const std::string form =
      "packed_matmul_rows: x must have one code a byte, of 2 to 8 bits, and zero points that are "
      "codes";
  CHECK(refused([](auto& x, auto&) { x.spec.include_zero = false; }) == form);
  CHECK(refused([](auto& x, auto&) { x.spec.bits = 9; }) == form);
  CHECK(refused([](auto& x, auto&) { x.paired = true; }) == form);
  CHECK(refused([](auto&, auto& y) {
          y = Tensor::empty({2, 16}, DType::F32);
        }) == "packed_matmul_rows: grid [1, 2] and y [2, 16], expected [1, 2] and [1, 16]");
}

}  // namespace
}  // namespace omq
