// Packed weights: the layout's round trip, and every instruction set's kernels against a
// double-precision product.
//
// Bounds: dequantisation is bit for bit scale · (code − zero) in F32. A product's NMSE (Σ(y−r)² /
// Σr²) stays below 1e-8 for the vector kernels on few rows, whose activations are rounded to 15
// bits (relative error near 2e-5, squared), and below 1e-11 where everything is float.
#include "tensor/packed.h"

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

constexpr double kQuantizedBound = 1e-8, kFloatBound = 1e-11;

struct Sample {
  Tensor codes, scale, zero;
  GroupSpec spec;
  PackedInt packed;

  float weight(int64_t row, int64_t col) const {
    const int64_t i = row * scale.dim(1) + col / spec.group_cols(codes.dim(1));
    const float z =
        spec.symmetric ? static_cast<float>(1 << (spec.bits - 1)) : zero.data<float>()[i];
    const float code = static_cast<float>(codes.data<uint8_t>()[row * codes.dim(1) + col]);
    return scale.data<float>()[i] * (code - z);
  }
};

Sample sample(int64_t rows, int64_t cols, GroupSpec spec, unsigned seed = 1) {
  std::mt19937 rng(seed);
  const int64_t groups = spec.groups(cols);
  Sample s{Tensor::empty({rows, cols}, DType::U8),
           Tensor::empty({rows, groups}, DType::F32),
           Tensor::empty({rows, groups}, DType::F32),
           spec,
           {}};
  for (int64_t i = 0; i < rows * cols; ++i)
    s.codes.data<uint8_t>()[i] = static_cast<uint8_t>(rng() % (1u << spec.bits));
  for (int64_t i = 0; i < rows * groups; ++i) {
    const float raw = 1e-3f + 1e-5f * static_cast<float>(rng() % 1000);
    s.scale.data<float>()[i] = f16_bits_to_f32(f32_to_f16_bits(raw));
    s.zero.data<float>()[i] = static_cast<float>(rng() % (1u << spec.bits));
  }
  s.packed = pack_codes(s.codes, s.scale, s.zero, spec);
  return s;
}

Tensor random_rows(int64_t m, int64_t k, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Tensor x = Tensor::empty({m, k}, DType::F32);
  for (int64_t i = 0; i < m * k; ++i) x.data<float>()[i] = normal(rng);
  return x;
}

// NMSE of y against x · wᵀ in double; weight(n, k) gives w.
template <class W> double product_error(const Tensor& y, const Tensor& x, W&& weight) {
  const int64_t m = y.dim(0), n = y.dim(1), k = x.dim(1);
  double error = 0, norm = 0;
  std::vector<double> row(static_cast<size_t>(k));
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t c = 0; c < k; ++c) row[static_cast<size_t>(c)] = static_cast<double>(weight(j, c));
    for (int64_t i = 0; i < m; ++i) {
      double r = 0;
      for (int64_t c = 0; c < k; ++c)
        r += row[static_cast<size_t>(c)] * static_cast<double>(x.data<float>()[i * k + c]);
      const double d = static_cast<double>(y.data<float>()[i * n + j]) - r;
      error += d * d, norm += r * r;
    }
  }
  return error / std::max(norm, 1e-300);
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && std::memcmp(a.raw(), b.raw(), a.nbytes()) == 0;
}

std::string message_of(auto&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

const std::vector<GroupSpec>& specs() {
  static const std::vector<GroupSpec> all = [] {
    std::vector<GroupSpec> list;
    for (int bits : {2, 3, 4, 8})
      for (int64_t group : {0, 32, 40, 64, 128})
        for (bool symmetric : {false, true})
          list.push_back({.bits = bits, .group_size = group, .symmetric = symmetric});
    return list;
  }();
  return all;
}

void capture_and_check_round_trip(int64_t rows, int64_t cols, GroupSpec spec) {
  const Sample s = sample(rows, cols, spec);
  const Unpacked u = unpack_codes(s.packed);
  bool codes = true, grid = true;
  const int shift = spec.symmetric ? (1 << (s.packed.spec.bits - 1)) - (1 << (spec.bits - 1)) : 0;
  for (int64_t i = 0; i < s.codes.numel(); ++i)
    codes = codes && u.codes.data<uint8_t>()[i] == s.codes.data<uint8_t>()[i] + shift;
  for (int64_t i = 0; i < s.scale.numel(); ++i) {
    const float zero = spec.symmetric ? static_cast<float>(1 << (s.packed.spec.bits - 1))
                                      : s.zero.data<float>()[i];
    grid = grid && u.scale.data<float>()[i] == s.scale.data<float>()[i] &&
           u.zero.data<float>()[i] == zero;
  }
  CAPTURE(rows);
  CAPTURE(cols);
  CAPTURE(spec.bits);
  CAPTURE(spec.group_size);
  CHECK(codes);
  CHECK(grid);
  CHECK(static_cast<int64_t>(s.packed.data.nbytes()) == s.packed.nbytes());
}

TEST_CASE("packing and unpacking give back codes, scales and zeros") {
  for (int64_t rows : {1, 15, 16, 17, 40})
    for (int64_t cols : {1, 7, 40, 64, 576, 600})
      for (const GroupSpec& spec : specs()) capture_and_check_round_trip(rows, cols, spec);
  for (int bits : {5, 6, 7})
    for (bool symmetric : {false, true})
      capture_and_check_round_trip(17, 40,
                                   {.bits = bits, .group_size = 32, .symmetric = symmetric});
}

TEST_CASE("a 4-bit block lies as packed.h draws it") {
  // Row 3, columns 0 … 7 hold 1 … 8; the rest is 0. One group of 8 columns is one 64-byte vector.
  Tensor codes = Tensor::zeros({16, 8}, DType::U8);
  for (int c = 0; c < 8; ++c) codes.data<uint8_t>()[3 * 8 + c] = static_cast<uint8_t>(c + 1);
  const PackedInt w = pack_codes(codes, Tensor::full({16, 1}, 0.5), Tensor::full({16, 1}, 2), {});
  REQUIRE(w.nbytes() == 64 + 48);
  const uint8_t* bytes = w.data.data<uint8_t>();
  for (int j = 0; j < 4; ++j) CHECK(bytes[4 * 3 + j] == ((j + 5) << 4 | (j + 1)));
  CHECK(bytes[0] == 0);
  CHECK(bytes[64] == 0x00);  // 0.5 as f16 is 0x3800
  CHECK(bytes[65] == 0x38);
  CHECK(bytes[64 + 31] == 0x38);
  for (int r = 0; r < 16; ++r) CHECK(bytes[64 + 32 + r] == 2);
}

TEST_CASE("dequantisation is scale · (code − zero), bit for bit, on every instruction set") {
  Restore restore;
  for (const char* name : packed_isas_here()) {
    REQUIRE(force_packed_isa(name));
    CAPTURE(name);
    for (int64_t rows : {1, 17, 40})
      for (int64_t cols : {1, 7, 40, 600})
        for (const GroupSpec& spec : specs()) {
          const Sample s = sample(rows, cols, spec, 7);
          Tensor y = Tensor::empty({rows, cols}, DType::F32);
          cpu::packed_dequantize(y, s.packed);
          bool equal = true;
          for (int64_t i = 0; i < rows * cols; ++i)
            equal = equal && y.data<float>()[i] == s.weight(i / cols, i % cols);
          CAPTURE(rows);
          CAPTURE(cols);
          CAPTURE(spec.bits);
          CAPTURE(spec.group_size);
          CHECK(equal);
        }
  }
}

TEST_CASE("packed_embedding gathers dequantised rows") {
  for (int bits : {2, 3, 4, 8}) {
    const Sample s = sample(40, 600, {.bits = bits, .group_size = 128}, 3);
    const Tensor ids = Tensor::from<int32_t>({39, 0, 16, 16}, {4});
    Tensor y = Tensor::empty({4, 600}, DType::F32);
    cpu::packed_embedding(y, s.packed, ids);
    bool equal = true;
    for (int64_t i = 0; i < y.numel(); ++i)
      equal = equal && y.data<float>()[i] == s.weight(ids.data<int32_t>()[i / 600], i % 600);
    CHECK(equal);
    const Tensor bad = Tensor::from<int32_t>({0, 0, 40, 0}, {4});
    CHECK(message_of([&] { cpu::packed_embedding(y, s.packed, bad); }) ==
          "packed_embedding: id 40 at 2 is outside [0, 40)");
  }
}

TEST_CASE("packed_matmul equals the double-precision product on every instruction set") {
  Restore restore;
  for (const char* name : packed_isas_here()) {
    REQUIRE(force_packed_isa(name));
    CAPTURE(name);
    for (const GroupSpec& spec : specs())
      for (auto [rows, cols] : {std::pair<int64_t, int64_t>{40, 600}, {17, 7}, {150, 64}, {1, 1}}) {
        const Sample s = sample(rows, cols, spec, 11);
        for (int64_t m : {1, 2, 3, 5, 8, 9, 33}) {
          const Tensor x = random_rows(m, cols, static_cast<unsigned>(m));
          Tensor y = Tensor::full({m, rows}, std::nan(""));
          cpu::packed_matmul(y, x, s.packed);
          CAPTURE(spec.bits);
          CAPTURE(spec.group_size);
          CAPTURE(spec.symmetric);
          CAPTURE(rows);
          CAPTURE(cols);
          CAPTURE(m);
          const bool exact = std::string_view(name) == "scalar";
          CHECK(product_error(y, x, [&](int64_t n, int64_t k) { return s.weight(n, k); }) <
                (exact ? kFloatBound : kQuantizedBound));
        }
      }
  }
}

TEST_CASE("packed_matmul of many rows: several blocks and passes, whatever is left over") {
  Restore restore;
  struct Case {
    int64_t rows, cols, m;  // y of the second goes past the caches
  };
  for (const auto& [rows, cols, m] : {Case{56, 6000, 275}, Case{2112, 72, 130}})
    for (int bits : {2, 3, 4, 8}) {
      const Sample s = sample(rows, cols, {.bits = bits, .group_size = bits == 2 ? 0 : 128}, 12);
      const Tensor x = random_rows(m, cols, 13);
      for (const char* name : packed_isas_here()) {
        if (std::string_view(name) == "scalar") continue;
        REQUIRE(force_packed_isa(name));
        CAPTURE(name);
        CAPTURE(bits);
        Tensor y = Tensor::full({m, rows}, std::nan(""));
        cpu::packed_matmul(y, x, s.packed);
        CHECK(product_error(y, x, [&](int64_t n, int64_t k) { return s.weight(n, k); }) <
              kQuantizedBound);
      }
    }
}

TEST_CASE("a row has the same bits alone and among many, on AMX tiles and in AVX-512 loops") {
  Restore restore;
  bool here = false;
  // Tables whose products are sums of whole numbers however many rows there are.
  for (const char* name : {"amx", "avx512", "avx2"}) {
    if (!force_packed_isa(name)) continue;
    here = true;
    CAPTURE(name);
    std::vector<GroupSpec> all = specs();
    for (const auto& [bits, group] :
         {std::pair{8, 4}, {4, 8}, {3, 16}, {2, 16}})  // the most chunks
      all.push_back({.bits = bits, .group_size = group});
    for (const GroupSpec& spec : all)
      for (int64_t cols : {328, 1200})  // one piece of columns, and several
        for (int64_t m : {9, 11, 16, 130}) {
          const Sample s = sample(150, cols, spec, 14);
          const Tensor x = random_rows(m, cols, 15);
          Tensor many = Tensor::empty({m, 150}, DType::F32);
          cpu::packed_matmul(many, x, s.packed);
          bool same = true;
          for (int64_t i = 0; i < m; ++i) {
            Tensor row = Tensor::empty({1, cols}, DType::F32),
                   alone = Tensor::empty({1, 150}, DType::F32);
            std::memcpy(row.raw(), x.data<float>() + i * cols, row.nbytes());
            cpu::packed_matmul(alone, row, s.packed);
            same = same && std::memcmp(alone.raw(), many.data<float>() + 150 * i, 600) == 0;
          }
          CAPTURE(spec.bits);
          CAPTURE(spec.group_size);
          CAPTURE(cols);
          CAPTURE(m);
          CHECK(same);
          if (std::string_view(name) != "amx") continue;
          REQUIRE(force_packed_isa("avx512"));
          Tensor loops = Tensor::empty({m, 150}, DType::F32);
          cpu::packed_matmul(loops, x, s.packed);
          CHECK(std::memcmp(many.raw(), loops.raw(), many.nbytes()) == 0);
          REQUIRE(force_packed_isa("amx"));
        }
  }
  if (!here) MESSAGE("skipped: none of amx, avx512 and avx2 here");
}

TEST_CASE("packed_matmul keeps large, tiny and missing activations in their place") {
  Restore restore;
  const Sample s = sample(16, 256, {.bits = 4, .group_size = 128}, 5);
  for (const char* name : packed_isas_here()) {
    REQUIRE(force_packed_isa(name));
    CAPTURE(name);
    for (int64_t m : {1, 17}) {  // one row, or one among many
      CAPTURE(m);
      const int64_t row = m / 2;
      // An outlier of 1e4 in one group leaves the other group's precision alone; zeros stay exact.
      Tensor x = random_rows(m, 256, 9), y = Tensor::empty({m, 16}, DType::F32);
      float* ours = x.data<float>() + row * 256;
      const float* result = y.data<float>() + row * 16;
      for (int64_t c = 0; c < 128; ++c) ours[c] = 0.0f;
      ours[0] = 1e4f;
      cpu::packed_matmul(y, x, s.packed);
      CHECK(product_error(y, x, [&](int64_t n, int64_t k) { return s.weight(n, k); }) <
            kQuantizedBound);
      const std::vector<float> good(y.data<float>(), y.data<float>() + y.numel());
      for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
        ours[200] = bad;
        cpu::packed_matmul(y, x, s.packed);
        for (int i = 0; i < 16; ++i) CHECK(!std::isfinite(result[i]));
        for (int64_t i = 0; i < y.numel(); ++i)
          if (i / 16 != row) CHECK(y.data<float>()[i] == good[static_cast<size_t>(i)]);
      }
      for (int64_t c = 0; c < 256; ++c) ours[c] = 0.0f;
      cpu::packed_matmul(y, x, s.packed);
      for (int i = 0; i < 16; ++i) CHECK(result[i] == 0.0f);
    }
  }
}

TEST_CASE("the extremes of codes and activations fit the integer sums") {
  Restore restore;
  for (const char* name : packed_isas_here()) {
    REQUIRE(force_packed_isa(name));
    for (float zero : {0.0f, 255.0f})
      for (float sign : {1.0f, -1.0f}) {
        const uint8_t code = zero == 0.0f ? 255 : 0;
        const PackedInt w =
            pack_codes(Tensor::full({16, 256}, code, DType::U8), Tensor::full({16, 1}, 1.0),
                       Tensor::full({16, 1}, static_cast<double>(zero)), {.bits = 8});
        for (int64_t m : {1, 17}) {
          const Tensor x = Tensor::full({m, 256}, static_cast<double>(sign));
          Tensor y = Tensor::empty({m, 16}, DType::F32);
          cpu::packed_matmul(y, x, w);
          CAPTURE(name);
          CAPTURE(m);
          for (int64_t i = 0; i < y.numel(); ++i)
            CHECK(y.data<float>()[i] ==
                  doctest::Approx(sign * (zero == 0.0f ? 1.0f : -1.0f) * 255 * 256));
        }
      }
  }
}

TEST_CASE("the extremes of narrow codes and of both bytes of an activation fit 16-bit sums") {
  Restore restore;
  // 32384 of 32512 is 127 · 256 − 128, and −32385 is −127 · 256 + 127: both bytes are as large as
  // they get.
  constexpr float kPeak = 32512;
  for (const char* name : packed_isas_here()) {
    if (std::string_view(name) == "scalar") continue;  // its sums are F32
    REQUIRE(force_packed_isa(name));
    CAPTURE(name);
    for (int bits : {2, 3, 4}) {
      const int top = (1 << bits) - 1;
      const PackedInt w =
          pack_codes(Tensor::full({16, 256}, top, DType::U8), Tensor::full({16, 2}, 1.0),
                     Tensor::full({16, 2}, 0.0), {.bits = bits, .group_size = 128});
      for (float both : {32384.0f, -32385.0f})
        for (int64_t m : {1, 2, 3, 4, 17}) {
          Tensor x = Tensor::full({m, 256}, static_cast<double>(both));
          for (int64_t i = 0; i < m; ++i)
            for (int64_t c : {0, 128}) x.data<float>()[256 * i + c] = kPeak;
          Tensor y = Tensor::empty({m, 16}, DType::F32);
          cpu::packed_matmul(y, x, w);
          CAPTURE(bits);
          CAPTURE(m);
          const double want = (2.0 * kPeak + 254.0 * both) * top;
          for (int64_t i = 0; i < y.numel(); ++i)
            CHECK(y.data<float>()[i] == doctest::Approx(want).epsilon(1e-6));
        }
    }
  }
}

template <class F> void check_thread_invariance(int64_t m, int64_t n, F&& product) {
  Tensor first;
  for (int threads : {1, 2, 3}) {
    set_num_threads(threads);
    Tensor y = Tensor::full({m, n}, std::nan(""));
    product(y);
    if (threads == 1) first = y;
    CAPTURE(threads);
    CHECK(same_bits(first, y));
  }
}

TEST_CASE("results are bit-identical on 1, 2 and 3 threads") {
  Restore restore;
  for (const char* name : packed_isas_here()) {
    REQUIRE(force_packed_isa(name));
    CAPTURE(name);
    for (int64_t m : {1, 3, 8, 40}) {
      const Tensor x = random_rows(m, 328, 2);
      for (int bits : {2, 3, 4, 8}) {
        const Sample s = sample(600, 328, {.bits = bits, .group_size = 128}, 4);
        check_thread_invariance(m, 600, [&](Tensor& y) { cpu::packed_matmul(y, x, s.packed); });
      }
      Tensor w = Tensor::empty({600, 328}, DType::BF16);
      for (int64_t i = 0; i < w.numel(); ++i)
        w.data<bf16_t>()[i] = bf16_t(std::sin(static_cast<float>(i)));
      check_thread_invariance(m, 600, [&](Tensor& y) { cpu::dense_matmul(y, x, w); });
    }
  }
}

template <class T> void check_dense(int64_t rows, int64_t cols, int64_t m) {
  Tensor w = Tensor::empty({rows, cols}, dtype_of<T>());
  for (int64_t i = 0; i < w.numel(); ++i)
    w.data<T>()[i] = T(std::sin(static_cast<float>(i) * 0.37f));
  const Tensor x = random_rows(m, cols, 21);
  Tensor y = Tensor::full({m, rows}, std::nan(""));
  cpu::dense_matmul(y, x, w);
  CAPTURE(dtype_name(dtype_of<T>()));
  CAPTURE(rows);
  CAPTURE(cols);
  CAPTURE(m);
  CHECK(product_error(y, x, [&](int64_t n, int64_t k) {
          return static_cast<float>(w.data<T>()[n * cols + k]);
        }) < kFloatBound);
}

TEST_CASE("dense_matmul equals the double-precision product for F32, BF16 and F16") {
  Restore restore;
  for (const char* name : packed_isas_here()) {
    REQUIRE(force_packed_isa(name));
    CAPTURE(name);
    for (int64_t m : {1, 2, 5, 8, 9, 33})
      for (auto [rows, cols] : {std::pair<int64_t, int64_t>{40, 600}, {17, 7}, {5, 33}, {1, 1}}) {
        check_dense<float>(rows, cols, m);
        check_dense<bf16_t>(rows, cols, m);
        check_dense<f16_t>(rows, cols, m);
      }
  }
}

TEST_CASE("an instruction set can be forced by name") {
  Restore restore;
  CHECK(force_packed_isa("scalar"));
  CHECK(std::string_view(packed_isa_name()) == "scalar");
  CHECK_FALSE(force_packed_isa("vax"));
  CHECK(std::string_view(packed_isa_name()) == "scalar");
  CHECK(std::string_view(packed_isas_here().back()) == "scalar");
}

TEST_CASE("packing refuses what it could not give back") {
  const auto pack = [](double code, double scale, double zero, GroupSpec spec) {
    return message_of([&] {
      pack_codes(Tensor::full({2, 8}, code, DType::U8), Tensor::full({2, 1}, scale),
                 Tensor::full({2, 1}, zero), spec);
    });
  };
  CHECK(pack(7, 0.5, 3, {.bits = 3}) == "");
  CHECK(pack(8, 0.5, 3, {.bits = 3}) ==
        "pack_codes: code 8 at row 0, column 0 does not fit 3 bits");
  CHECK(pack(1, 0.5, 2.5, {}) ==
        "pack_codes: zero point 2.5 of row 0, group 0 is not a whole number in [0, 15]");
  CHECK(pack(1, 0.5, 16, {}).find("zero point 16 of row 0, group 0") != std::string::npos);
  CHECK(pack(1, 0.5, std::nan(""), {}).find("is not a whole number") != std::string::npos);
  CHECK(pack(1, 0.1, 0, {}).find("is not a finite f16 value") != std::string::npos);
  CHECK(pack(1, 1e6, 0, {}).find("scale 1000000") != std::string::npos);
  CHECK(pack(1, 0.5, 0, {.bits = 1}) == "pack_codes: bits must be 2 to 8, got 1");
  CHECK(pack(1, 0.5, 0, {.group_size = 4}).find("scale must be [2, 2], got [2, 1]") !=
        std::string::npos);
  CHECK(pack(1, 0.5, 0, {.group_size = -1}) ==
        "pack_codes: group_size must not be negative, got -1");
}

TEST_CASE("kernels refuse shapes and data that do not fit") {
  const Sample s = sample(16, 64, {.bits = 4, .group_size = 32});
  Tensor y = Tensor::empty({1, 16}, DType::F32);
  const Tensor narrow = Tensor::zeros({1, 63});
  CHECK(message_of([&] { cpu::packed_matmul(y, narrow, s.packed); }) ==
        "packed_matmul: x [1, 63] does not fit w [16, 64]: inner dims differ");
  PackedInt cut = s.packed;
  cut.rows = 17;
  CHECK(message_of([&] { cpu::packed_matmul(y, narrow, cut); }).find("the data has 608") !=
        std::string::npos);
  CHECK(message_of([&] { unpack_codes(cut); }).find("takes 1216 bytes") != std::string::npos);
  const Tensor x = Tensor::zeros({1, 64});
  CHECK(message_of([&] { cpu::dense_matmul(y, x, s.codes); }) ==
        "dense_matmul: w must be F32, BF16 or F16, got U8");
}

}  // namespace
}  // namespace omq
