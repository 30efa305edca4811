// One short decoder per GGUF block format; field order and element order follow
// spec/interop-formats.md §5.
#include "models/gguf_blocks.h"

#include <algorithm>
#include <cstring>

#include "tensor/error.h"
#include "tensor/numeric.h"
#include "tensor/parallel.h"

namespace omq {

namespace {

uint16_t u16_at(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }
float f16_at(const uint8_t* p) { return f16_bits_to_f32(u16_at(p)); }

// ---- plain numbers

void decode_f32(const uint8_t* from, float* to, int64_t n) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}
void decode_f16(const uint8_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = f16_at(from + 2 * i);
}
void decode_bf16(const uint8_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = bf16_bits_to_f32(u16_at(from + 2 * i));
}

// ---- 32 values a block. Byte j of qs holds value j (low nibble) and value j + 16 (high nibble).

void decode_q8_0(const uint8_t* from, float* to, int64_t blocks) {  // f16 d; i8 q[32]
  for (int64_t b = 0; b < blocks; ++b, from += 34, to += 32) {
    const float d = f16_at(from);
    for (int j = 0; j < 32; ++j) to[j] = static_cast<float>(static_cast<int8_t>(from[2 + j])) * d;
  }
}

void decode_q4_0(const uint8_t* from, float* to, int64_t blocks) {  // f16 d; qs[16]
  for (int64_t b = 0; b < blocks; ++b, from += 18, to += 32) {
    const float d = f16_at(from);
    for (int j = 0; j < 16; ++j) {
      to[j] = static_cast<float>((from[2 + j] & 15) - 8) * d;
      to[j + 16] = static_cast<float>((from[2 + j] >> 4) - 8) * d;
    }
  }
}

void decode_q4_1(const uint8_t* from, float* to, int64_t blocks) {  // f16 d, m; qs[16]
  for (int64_t b = 0; b < blocks; ++b, from += 20, to += 32) {
    const float d = f16_at(from), m = f16_at(from + 2);
    for (int j = 0; j < 16; ++j) {
      to[j] = static_cast<float>(from[4 + j] & 15) * d + m;
      to[j + 16] = static_cast<float>(from[4 + j] >> 4) * d + m;
    }
  }
}

// Bit j of the 32-bit word at qh is the fifth bit of value j.
int high_bit(const uint8_t* qh, int j) { return (qh[j / 8] >> (j % 8) & 1) << 4; }

void decode_q5_0(const uint8_t* from, float* to, int64_t blocks) {  // f16 d; qh[4]; qs[16]
  for (int64_t b = 0; b < blocks; ++b, from += 22, to += 32) {
    const float d = f16_at(from);
    for (int j = 0; j < 16; ++j) {
      const int q = from[6 + j];
      to[j] = static_cast<float>(((q & 15) | high_bit(from + 2, j)) - 16) * d;
      to[j + 16] = static_cast<float>(((q >> 4) | high_bit(from + 2, j + 16)) - 16) * d;
    }
  }
}

void decode_q5_1(const uint8_t* from, float* to, int64_t blocks) {  // f16 d, m; qh[4]; qs[16]
  for (int64_t b = 0; b < blocks; ++b, from += 24, to += 32) {
    const float d = f16_at(from), m = f16_at(from + 2);
    for (int j = 0; j < 16; ++j) {
      const int q = from[8 + j];
      to[j] = static_cast<float>((q & 15) | high_bit(from + 4, j)) * d + m;
      to[j + 16] = static_cast<float>((q >> 4) | high_bit(from + 4, j + 16)) * d + m;
    }
  }
}

// ---- 256 values a block, with small scales inside

void decode_q2_k(const uint8_t* from, float* to,
                 int64_t blocks) {  // scales[16]; qs[64]; f16 d, dmin
  for (int64_t b = 0; b < blocks; ++b, from += 84) {
    const uint8_t *scales = from, *qs = from + 16;
    const float d = f16_at(from + 80), dmin = f16_at(from + 82);
    for (int half = 0; half < 2; ++half, qs += 32) {
      for (int shift = 0; shift < 8; shift += 2) {
        for (int l = 0; l < 32; ++l) {
          const int sc = scales[8 * half + shift + l / 16];
          const float q = static_cast<float>(qs[l] >> shift & 3);
          *to++ = d * static_cast<float>(sc & 15) * q - dmin * static_cast<float>(sc >> 4);
        }
      }
    }
  }
}

// Scale i of the sixteen 6-bit ones: low nibbles in 8 bytes, the top two bits in the 4 bytes after
// them.
int q3_scale(const uint8_t* s, int i) {
  const int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4;
  return (low | (s[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) - 32;
}

void decode_q3_k(const uint8_t* from, float* to,
                 int64_t blocks) {  // hmask[32]; qs[64]; scales[12]; f16 d
  for (int64_t b = 0; b < blocks; ++b, from += 110) {
    const uint8_t *mask = from, *qs = from + 32, *scales = from + 96;
    const float d = f16_at(from + 108);
    for (int half = 0; half < 2; ++half, qs += 32) {
      for (int shift = 0; shift < 8; shift += 2) {
        const int bit = 4 * half + shift / 2;
        for (int l = 0; l < 32; ++l) {
          const float dl = d * static_cast<float>(q3_scale(scales, 8 * half + shift + l / 16));
          const int q = (qs[l] >> shift & 3) - ((mask[l] >> bit & 1) ? 0 : 4);
          *to++ = dl * static_cast<float>(q);
        }
      }
    }
  }
}

struct ScaleMin {
  int scale, min;
};
// Pair j of the eight (scale, minimum) pairs of 6 bits each that Q4_K and Q5_K pack in 12 bytes.
ScaleMin scale_min(const uint8_t* s, int j) {
  if (j < 4) return {s[j] & 63, s[j + 4] & 63};
  return {(s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4};
}

void decode_q4_k(const uint8_t* from, float* to,
                 int64_t blocks) {  // f16 d, dmin; scales[12]; qs[128]
  for (int64_t b = 0; b < blocks; ++b, from += 144) {
    const float d = f16_at(from), dmin = f16_at(from + 2);
    for (int j = 0; j < 8; ++j) {
      const ScaleMin sm = scale_min(from + 4, j);
      const float dl = d * static_cast<float>(sm.scale), ml = dmin * static_cast<float>(sm.min);
      const uint8_t* qs = from + 16 + 32 * (j / 2);
      for (int l = 0; l < 32; ++l)
        *to++ = dl * static_cast<float>(qs[l] >> (4 * (j % 2)) & 15) - ml;
    }
  }
}

void decode_q5_k(const uint8_t* from, float* to,
                 int64_t blocks) {  // as Q4_K, with qh[32] before qs
  for (int64_t b = 0; b < blocks; ++b, from += 176) {
    const float d = f16_at(from), dmin = f16_at(from + 2);
    const uint8_t* qh = from + 16;
    for (int j = 0; j < 8; ++j) {
      const ScaleMin sm = scale_min(from + 4, j);
      const float dl = d * static_cast<float>(sm.scale), ml = dmin * static_cast<float>(sm.min);
      const uint8_t* qs = from + 48 + 32 * (j / 2);
      for (int l = 0; l < 32; ++l) {
        const int q = (qs[l] >> (4 * (j % 2)) & 15) | (qh[l] >> j & 1) << 4;
        *to++ = dl * static_cast<float>(q) - ml;
      }
    }
  }
}

void decode_q6_k(const uint8_t* from, float* to,
                 int64_t blocks) {  // ql[128]; qh[64]; i8 scales[16]; f16 d
  for (int64_t b = 0; b < blocks; ++b, from += 210) {
    const uint8_t *ql = from, *qh = from + 128, *scales = from + 192;
    const float d = f16_at(from + 208);
    for (int half = 0; half < 2; ++half, ql += 64, qh += 32, scales += 8) {
      for (int quarter = 0; quarter < 4; ++quarter) {  // values 32·quarter … of this half
        for (int l = 0; l < 32; ++l) {
          const int low = ql[l + 32 * (quarter % 2)] >> (4 * (quarter / 2)) & 15;
          const int q = (low | (qh[l] >> (2 * quarter) & 3) << 4) - 32;
          const int sc = static_cast<int8_t>(scales[2 * quarter + l / 16]);
          *to++ = d * static_cast<float>(sc) * static_cast<float>(q);
        }
      }
    }
  }
}

// clang-format off
constexpr GgmlType kTypes[] = {
    {kGgmlF32, "F32", 1, 4, decode_f32},   {kGgmlF16, "F16", 1, 2, decode_f16},
    {2, "Q4_0", 32, 18, decode_q4_0},      {3, "Q4_1", 32, 20, decode_q4_1},
    {6, "Q5_0", 32, 22, decode_q5_0},      {7, "Q5_1", 32, 24, decode_q5_1},
    {8, "Q8_0", 32, 34, decode_q8_0},      {9, "Q8_1", 32, 36, nullptr},
    {10, "Q2_K", 256, 84, decode_q2_k},    {11, "Q3_K", 256, 110, decode_q3_k},
    {12, "Q4_K", 256, 144, decode_q4_k},   {13, "Q5_K", 256, 176, decode_q5_k},
    {14, "Q6_K", 256, 210, decode_q6_k},   {15, "Q8_K", 256, 292, nullptr},
    {16, "IQ2_XXS", 256, 66, nullptr},     {17, "IQ2_XS", 256, 74, nullptr},
    {18, "IQ3_XXS", 256, 98, nullptr},     {19, "IQ1_S", 256, 50, nullptr},
    {20, "IQ4_NL", 32, 18, nullptr},       {21, "IQ3_S", 256, 110, nullptr},
    {22, "IQ2_S", 256, 82, nullptr},       {23, "IQ4_XS", 256, 136, nullptr},
    {24, "I8", 1, 1, nullptr},             {25, "I16", 1, 2, nullptr},
    {26, "I32", 1, 4, nullptr},            {27, "I64", 1, 8, nullptr},
    {28, "F64", 1, 8, nullptr},            {29, "IQ1_M", 256, 56, nullptr},
    {30, "BF16", 1, 2, decode_bf16},       {34, "TQ1_0", 256, 54, nullptr},
    {35, "TQ2_0", 256, 66, nullptr},       {39, "MXFP4", 32, 17, nullptr},
    {41, "Q1_0", 128, 18, nullptr},        {42, "Q2_0", 64, 18, nullptr},
};
// clang-format on

}  // namespace

const GgmlType* find_ggml_type(uint32_t id) {
  const auto* row = std::find_if(std::begin(kTypes), std::end(kTypes),
                                 [&](const GgmlType& t) { return t.id == id; });
  return row == std::end(kTypes) ? nullptr : row;
}

void ggml_to_f32(const GgmlType& type, std::span<const uint8_t> bytes, float* to, int64_t values) {
  check(type.decode != nullptr, "gguf: type {} is not decoded here", type.name);
  const int64_t blocks = values / type.values;
  check(blocks * type.values == values &&
            bytes.size() == static_cast<size_t>(blocks) * static_cast<size_t>(type.bytes),
        "gguf: {} values of type {} do not fill {} bytes", values, type.name, bytes.size());
  const int64_t grain = std::max<int64_t>(1, 16384 / type.values);  // 64 KiB of results
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    type.decode(bytes.data() + begin * type.bytes, to + begin * type.values, end - begin);
  });
}

}  // namespace omq
