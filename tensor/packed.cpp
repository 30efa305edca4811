// Packing and unpacking of low-bit weights: the reference of the "panel16" layout drawn in
// packed.h.
//
// Everything here goes by quads: 4 columns × 16 rows, 64 codes, what one unpacked 64-byte vector
// holds. pack_quad and unpack_quad are the only two functions of the library that say where a
// code's bits lie; the vector kernels are tested against them.
#include "tensor/packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor/cpu/packed_isa.h"
#include "tensor/numeric.h"

namespace omq {

namespace {

constexpr int64_t kQuadCodes = 64;  // 16 rows × 4 columns

// Where the bits of a quad of 3-bit codes stand in its three vectors (packed.h).
struct ThreeBits {
  uint8_t* vectors;
  int64_t quad;  // of the eight
  ThreeBits(uint8_t* block, int64_t q) : vectors(block + q / 8 * 3 * kQuadCodes), quad(q % 8) {}
  bool whole() const { return quad < 6; }  // or two bits and, in the last vector, one
  uint8_t& first(int64_t i) const {
    return vectors[(whole() ? quad / 2 : quad - 6) * kQuadCodes + i];
  }
  int64_t shift() const { return whole() ? quad % 2 * 3 : 6; }
  uint8_t& third(int64_t i) const { return vectors[2 * kQuadCodes + i]; }  // in bit `quad`
};

// The inverse of unpack_quad; the block's bytes start as zero.
void pack_quad(const uint8_t* codes, int bits, int64_t quad, uint8_t* block) {
  const auto add = [](uint8_t& byte, int more) { byte = static_cast<uint8_t>(byte | more); };
  if (bits == 3) {
    const ThreeBits at(block, quad);
    for (int64_t i = 0; i < kQuadCodes; ++i) {
      add(at.first(i), (at.whole() ? codes[i] : codes[i] & 3) << at.shift());
      if (!at.whole()) add(at.third(i), codes[i] >> 2 << at.quad);
    }
    return;
  }
  const int64_t per_vector = 8 / bits;  // quads that share one 64-byte vector
  uint8_t* vector = block + quad / per_vector * kQuadCodes;
  for (int64_t i = 0; i < kQuadCodes; ++i) add(vector[i], codes[i] << quad % per_vector * bits);
}

void check_spec(const char* op, const GroupSpec& spec, int64_t rows, int64_t cols) {
  check(spec.bits >= 2 && spec.bits <= 8, "{}: bits must be 2 to 8, got {}", op, spec.bits);
  check(spec.group_size >= 0, "{}: group_size must not be negative, got {}", op, spec.group_size);
  check(rows > 0 && cols > 0, "{}: matrix [{}, {}] is empty", op, rows, cols);
}

void check_matrix(const char* what, const Tensor& t, DType dtype, int64_t rows, int64_t cols) {
  check(t.defined(), "pack_codes: {} is undefined", what);
  check(t.device().type == DeviceType::CPU, "pack_codes: {} must be on the CPU", what);
  check(t.dtype() == dtype, "pack_codes: {} must be {}, got {}", what, dtype_name(dtype),
        dtype_name(t.dtype()));
  check(t.shape() == (Shape{rows, cols}), "pack_codes: {} must be [{}, {}], got {}", what, rows,
        cols, t.shape());
  check(t.is_contiguous(), "pack_codes: {} must be contiguous", what);
}

// Rejects what the file could not hold exactly.
void check_grid(const Tensor& scale, const Tensor& zero, const GroupSpec& spec) {
  const int64_t groups = scale.dim(1);
  const float* s = scale.data<float>();
  const float* z = spec.symmetric ? nullptr : zero.data<float>();
  for (int64_t i = 0; i < scale.numel(); ++i) {
    const float back = f16_bits_to_f32(f32_to_f16_bits(s[i]));
    check(std::isfinite(s[i]) && back == s[i],
          "pack_codes: scale {} of row {}, group {} is not a finite f16 value (nearest {}); round "
          "scales to f16 before the codes are chosen",
          s[i], i / groups, i % groups, back);
    if (z == nullptr) continue;
    check(z[i] >= 0 && z[i] <= static_cast<float>(spec.max_code()) && z[i] == std::nearbyint(z[i]),
          "pack_codes: zero point {} of row {}, group {} is not a whole number in [0, {}]", z[i],
          i / groups, i % groups, spec.max_code());
  }
}

void check_codes(const Tensor& codes, const GroupSpec& spec) {
  const int64_t cols = codes.dim(1);
  const uint8_t* c = codes.data<uint8_t>();
  for (int64_t i = 0; i < codes.numel(); ++i)
    check(c[i] <= spec.max_code(), "pack_codes: code {} at row {}, column {} does not fit {} bits",
          static_cast<int>(c[i]), i / cols, i % cols, spec.bits);
}

// Where the block of group g of panel p lies, and how far its parts reach.
struct Block {
  int64_t first_col, cols, padded, grid;  // grid: byte offset of the scales
};

Block block_of(const PackedInt& w, int64_t g) {
  const int64_t cols = w.group_columns(g);
  return {.first_col = g * w.spec.group_cols(w.cols),
          .cols = cols,
          .padded = PackedInt::padded_columns(cols, w.spec.bits),
          .grid = PackedInt::code_bytes(cols, w.spec.bits)};
}

void put_f16(uint8_t* at, float value) {
  const uint16_t bits = f32_to_f16_bits(value);
  std::memcpy(at, &bits, 2);
}

float get_f16(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return f16_bits_to_f32(bits);
}

}  // namespace

void cpu::unpack_quad(const uint8_t* block, int bits, int64_t quad, uint8_t* codes) {
  if (bits == 3) {
    const ThreeBits at(const_cast<uint8_t*>(block), quad);
    for (int64_t i = 0; i < kQuadCodes; ++i) {
      const int code = at.first(i) >> at.shift() & (at.whole() ? 7 : 3);
      codes[i] = static_cast<uint8_t>(at.whole() ? code : code | (at.third(i) >> at.quad & 1) << 2);
    }
    return;
  }
  const int64_t per_vector = 8 / bits;
  const uint8_t* vector = block + quad / per_vector * kQuadCodes;
  for (int64_t i = 0; i < kQuadCodes; ++i)
    codes[i] = static_cast<uint8_t>(vector[i] >> quad % per_vector * bits & ((1 << bits) - 1));
}

PackedInt pack_codes(const Tensor& codes, const Tensor& scale, const Tensor& zero, GroupSpec spec) {
  check(codes.defined() && codes.ndim() == 2, "pack_codes: codes must be a matrix [rows, cols]");
  const int64_t rows = codes.dim(0), cols = codes.dim(1);
  check_spec("pack_codes", spec, rows, cols);
  const int64_t groups = spec.groups(cols);
  check_matrix("codes", codes, DType::U8, rows, cols);
  check_matrix("scale", scale, DType::F32, rows, groups);
  if (!spec.symmetric) check_matrix("zero", zero, DType::F32, rows, groups);
  check_grid(scale, zero, spec);
  check_codes(codes, spec);

  PackedInt w{.data = {}, .rows = rows, .cols = cols, .spec = spec};
  w.spec.bits = stored_bits(spec.bits);
  w.data = Tensor::zeros({w.panels(), w.panel_bytes()}, DType::U8);
  // A symmetric zero is not stored but follows from the stored width: codes of 5 to 7 bits move
  // with it.
  const int fixed_zero = 1 << (w.spec.bits - 1);
  const int recentre = spec.symmetric ? fixed_zero - (1 << (spec.bits - 1)) : 0;
  const uint8_t* c = codes.data<uint8_t>();
  const float* s = scale.data<float>();
  const float* z = spec.symmetric ? nullptr : zero.data<float>();
  for (int64_t p = 0; p < w.panels(); ++p)
    for (int64_t g = 0; g < groups; ++g) {
      const Block b = block_of(w, g);
      uint8_t* bytes = w.data.data<uint8_t>() + p * w.panel_bytes() + g * w.block_bytes(0);
      const int64_t live_rows = std::min(kPanelRows, rows - p * kPanelRows);
      for (int64_t quad = 0; quad < b.padded / 4; ++quad) {
        uint8_t one[kQuadCodes] = {};
        for (int64_t i = 0; i < 4 * live_rows; ++i) {
          const int64_t row = p * kPanelRows + i / 4, col = 4 * quad + i % 4;
          const float fill = z ? z[row * groups + g] : static_cast<float>(fixed_zero);
          one[i] = col < b.cols ? static_cast<uint8_t>(c[row * cols + b.first_col + col] + recentre)
                                : static_cast<uint8_t>(fill);
        }
        pack_quad(one, w.spec.bits, quad, bytes);
      }
      for (int64_t r = 0; r < live_rows; ++r) {
        const int64_t i = (p * kPanelRows + r) * groups + g;
        put_f16(bytes + b.grid + 2 * r, s[i]);
        if (z) bytes[b.grid + 2 * kPanelRows + r] = static_cast<uint8_t>(z[i]);
      }
    }
  return w;
}

Unpacked unpack_codes(const PackedInt& w) {
  check_spec("unpack_codes", w.spec, w.rows, w.cols);
  check(w.spec.bits == stored_bits(w.spec.bits), "unpack_codes: {} bits are stored as 8",
        w.spec.bits);
  check(w.data.defined() && w.data.dtype() == DType::U8 &&
            static_cast<int64_t>(w.data.nbytes()) == w.nbytes(),
        "unpack_codes: a [{}, {}] matrix of {} bits takes {} bytes, the data has {}", w.rows,
        w.cols, w.spec.bits, w.nbytes(), w.data.nbytes());
  check(w.data.device().type == DeviceType::CPU, "unpack_codes: the matrix must be on the CPU");
  const int64_t groups = w.groups();
  Unpacked u{.codes = Tensor::empty({w.rows, w.cols}, DType::U8),
             .scale = Tensor::empty({w.rows, groups}, DType::F32),
             .zero = Tensor::empty({w.rows, groups}, DType::F32)};
  uint8_t* c = u.codes.data<uint8_t>();
  for (int64_t p = 0; p < w.panels(); ++p)
    for (int64_t g = 0; g < groups; ++g) {
      const Block b = block_of(w, g);
      const uint8_t* bytes = w.data.data<uint8_t>() + p * w.panel_bytes() + g * w.block_bytes(0);
      const int64_t live_rows = std::min(kPanelRows, w.rows - p * kPanelRows);
      for (int64_t col = 0; col < b.cols; col += 4) {
        uint8_t one[kQuadCodes];
        cpu::unpack_quad(bytes, w.spec.bits, col / 4, one);
        for (int64_t r = 0; r < live_rows; ++r)
          for (int64_t j = 0; j < std::min<int64_t>(4, b.cols - col); ++j)
            c[(p * kPanelRows + r) * w.cols + b.first_col + col + j] = one[4 * r + j];
      }
      for (int64_t r = 0; r < live_rows; ++r) {
        const int64_t i = (p * kPanelRows + r) * groups + g;
        u.scale.data<float>()[i] = get_f16(bytes + b.grid + 2 * r);
        u.zero.data<float>()[i] = static_cast<float>(
            w.spec.symmetric ? 1 << (w.spec.bits - 1) : bytes[b.grid + 2 * kPanelRows + r]);
      }
    }
  return u;
}

}  // namespace omq
