// The packed kernels' inner loops for AVX2 with FMA and F16C. Table and contract: packed_isa.h;
// layout: tensor/packed.h.
//
// gemv: a row of x becomes, chunk by chunk (≤ 128 columns of one group), whole numbers of 15 bits
// in int16 and one scale. Codes widen to 16 bits by mask and shift alone, because the two bytes of
// a 16-bit lane are neighbouring columns of one row: the low bytes are columns 0 and 2 of a quad,
// the high bytes 1 and 3. vpmaddwd then multiplies pairs and adds them in int32, which nothing here
// can overflow, whatever the width. A panel is two halves of 8 rows. A row of x that comes as codes
// takes the same loops, its codes less their zero point being the whole numbers.
//
// gemm_codes: many rows of codes. vpmaddubsw does twice as much, but adds its pairs of u8 · s8 in
// 16 bits and saturates there. Nibbles leave room: 8 pairs, 8 · 2 · 15 · 128 = 30720, fit. So
// panels are unpacked to nibbles once, codes of 8 bits to two planes of them, and sums widen every
// 8 quads.
//
// Compiled with this instruction set's flags: no standard or project header with inline functions
// may be included.
#include <cpuid.h>
#include <immintrin.h>

#include "tensor/cpu/packed_isa.h"

#define OMQ_INLINE __attribute__((always_inline)) inline
#define OMQ_UNROLL _Pragma("GCC unroll 16")

namespace omq::cpu {

namespace {

constexpr int64_t kRows = 16;             // of a panel
constexpr float kActMax = 32512.0f;       // as the AVX-512 planes, so that both quantise x alike
constexpr int64_t kPrefetchBytes = 1536;  // ahead in each stream

bool runs_here() {
  unsigned a, b, c, d;
  constexpr unsigned kF16c = 1u << 29;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & kF16c) != 0;
}

OMQ_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
OMQ_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
OMQ_INLINE __m256i load(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

// ---- prepared activations: one row = scales, sums, whole numbers, each padded to 64 bytes ----

struct Acts {
  const float* scale;  // [chunks]
  const int32_t* sum;  // [chunks] Σ of the whole numbers
  const int16_t* x;    // [chunks, chunk_stride], each quad in the order 0 2 1 3
};

OMQ_INLINE int64_t list_bytes(const PanelView& w) { return round_up(w.chunks * 4, 64); }

int64_t prepared_bytes(const PanelView& w) {
  return 2 * list_bytes(w) + round_up(2 * w.chunks * w.chunk_stride, 64);
}

OMQ_INLINE Acts acts_at(const PanelView& w, const std::byte* row) {
  return {reinterpret_cast<const float*>(row),
          reinterpret_cast<const int32_t*>(row + list_bytes(w)),
          reinterpret_cast<const int16_t*>(row + 2 * list_bytes(w))};
}

// One chunk of n columns, zeros up to the end of its slot. A value that is not finite makes the
// scale NaN, so that it shows in every output that it touches. Rounds half to even, as the vector
// conversion does.
void prepare_chunk(const float* x, int64_t n, int64_t slot, float* scale, int32_t* sum,
                   int16_t* out) {
  float peak = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float a = __builtin_fabsf(x[i]);
    finite = finite && a <= __FLT_MAX__;
    peak = a > peak ? a : peak;
  }
  const bool flat = !finite || peak < 1e-30f;  // below: 1 / scale would overflow
  *scale = !finite ? __builtin_nanf("") : flat ? 0.0f : peak / kActMax;
  const float inverse = flat ? 0.0f : kActMax / peak;
  int32_t total = 0;
  for (int64_t i = 0; i < slot; ++i) {
    const float v = flat || i >= n ? 0.0f : x[i] * inverse;
    const int32_t whole = _mm_cvtss_si32(_mm_set_ss(v));
    const int64_t j = i & 3;
    out[(i & ~int64_t{3}) + (j == 1 ? 2 : j == 2 ? 1 : j)] = static_cast<int16_t>(whole);
    total += whole;
  }
  *sum = total;
}

void prepare(const PanelView& w, const float* x, std::byte* out) {
  const Acts a = acts_at(w, out);
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t cols = g + 1 < w.groups ? w.group_cols : w.last_cols;
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk)
      prepare_chunk(x + g * w.group_cols + c, min64(w.chunk_cols, cols - c), w.chunk_stride,
                    const_cast<float*>(a.scale) + chunk, const_cast<int32_t*>(a.sum) + chunk,
                    const_cast<int16_t*>(a.x) + chunk * w.chunk_stride);
  }
}

// One chunk of whole numbers from codes, as prepare_chunk.
void prepare_chunk(const uint8_t* codes, int32_t zero, int64_t n, int64_t slot, int32_t* sum,
                   int16_t* out) {
  int32_t total = 0;
  for (int64_t i = 0; i < slot; ++i) {
    const int32_t whole = i < n ? codes[i] - zero : 0;
    const int64_t j = i & 3;
    out[(i & ~int64_t{3}) + (j == 1 ? 2 : j == 2 ? 1 : j)] = static_cast<int16_t>(whole);
    total += whole;
  }
  *sum = total;
}

void prepare_codes_for_gemv(const PanelView& w, const RowCodes& x, std::byte* out) {
  const Acts a = acts_at(w, out);
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t cols = g + 1 < w.groups ? w.group_cols : w.last_cols;
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk) {
      const_cast<float*>(a.scale)[chunk] = x.scale;
      prepare_chunk(x.codes + g * w.group_cols + c, x.zero, min64(w.chunk_cols, cols - c),
                    w.chunk_stride, const_cast<int32_t*>(a.sum) + chunk,
                    const_cast<int16_t*>(a.x) + chunk * w.chunk_stride);
    }
  }
}

// ---- unpacking: quad s of a half vector ----

template <int Bits>
inline constexpr int kQuads = Bits == 8   ? 1
                              : Bits == 4 ? 2
                                          : 4;  // in one 64-byte vector

struct Pairs {
  __m256i even, odd;  // columns 0 and 2, columns 1 and 3 of a quad
};

// Bits 4r + j of a word (8 rows) to the value 4 in byte 4r + j.
OMQ_INLINE __m256i third_bits(const uint8_t* word) {
  int32_t bits;
  __builtin_memcpy(&bits, word, 4);
  const __m256i source = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                          2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), source);
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit),
                          _mm256_set1_epi8(4));
}

// 8 rows × 4 columns, a byte a code.
template <int Bits> OMQ_INLINE __m256i unpack_bytes(__m256i v, const uint8_t* high, int s) {
  if constexpr (Bits == 8) return v;
  constexpr int kPlane = Bits == 3 ? 2 : Bits;
  const __m256i low =
      _mm256_and_si256(_mm256_srli_epi16(v, kPlane * s), _mm256_set1_epi8((1 << kPlane) - 1));
  if constexpr (Bits == 3) return _mm256_or_si256(low, third_bits(high + 8 * s));
  return low;
}

// The same as 16-bit lanes.
template <int Bits> OMQ_INLINE Pairs unpack(__m256i v, const uint8_t* high, int s) {
  if constexpr (Bits == 3) {
    const __m256i code = unpack_bytes<Bits>(v, high, s);
    return {_mm256_and_si256(code, _mm256_set1_epi16(255)), _mm256_srli_epi16(code, 8)};
  } else {
    const __m256i mask = _mm256_set1_epi16((1 << Bits) - 1);
    return {_mm256_and_si256(_mm256_srli_epi16(v, Bits * s), mask),
            _mm256_and_si256(_mm256_srli_epi16(v, 8 + Bits * s), mask)};
  }
}

template <int Bits> struct Block {
  static constexpr int64_t kStep = Bits == 8 ? 4 : Bits == 4 ? 8 : 16;
  static constexpr int64_t kLowBytes = kRows * (Bits == 3 ? 2 : Bits);  // of 8 columns
  int64_t cols, padded;
  int64_t high;  // 3 bits: offset of the high bits
  int64_t grid;  // offset of the scales

  OMQ_INLINE Block(const PanelView& w, int64_t g)
      : cols(g + 1 < w.groups ? w.group_cols : w.last_cols),
        padded(round_up(cols, kStep)),
        high(padded * 4),
        grid(padded * kRows * Bits / 8) {}
};

// 8 of the 16 values of a grid line.
OMQ_INLINE __m256 load_f16(const uint8_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
OMQ_INLINE __m256 zeros_at(const PanelView& w, const uint8_t* grid, int half) {
  return w.symmetric ? _mm256_set1_ps(static_cast<float>(1 << (w.bits - 1)))
                     : load_f16(grid + 2 * kRows + 16 * half);
}
OMQ_INLINE __m256i broadcast(const int16_t* x) {
  int32_t two_columns;
  __builtin_memcpy(&two_columns, x, 4);
  return _mm256_set1_epi32(two_columns);
}

// ---- y for P panels (streams) and M rows of x at once ----

template <int Bits, int P, int M>
OMQ_INLINE void chunk_dots(const uint8_t* low, const uint8_t* high, int64_t panel_bytes,
                           int64_t vectors, const Acts (&x)[M], int64_t at,
                           __m256i (&dot)[P][2][M]) {
  constexpr int Q = kQuads<Bits>;
  OMQ_UNROLL for (int p = 0; p < P; ++p) OMQ_UNROLL for (int m = 0; m < M; ++m) dot[p][0][m] =
      dot[p][1][m] = _mm256_setzero_si256();
  for (int64_t v = 0; v < vectors; ++v) OMQ_UNROLL for (int p = 0; p < P; ++p) {
      const uint8_t* lp = low + p * panel_bytes + v * 64;
      const uint8_t* hp = high + p * panel_bytes + v * 32;
      _mm_prefetch(reinterpret_cast<const char*>(lp + kPrefetchBytes), _MM_HINT_T0);
      if constexpr (Bits == 3)
        _mm_prefetch(reinterpret_cast<const char*>(hp + kPrefetchBytes), _MM_HINT_T0);
      OMQ_UNROLL for (int half = 0; half < 2; ++half) {
        const __m256i codes = load(lp + 32 * half);
        OMQ_UNROLL for (int s = 0; s < Q; ++s) {
          const Pairs q = unpack<Bits>(codes, hp + 4 * half, s);
          OMQ_UNROLL for (int m = 0; m < M; ++m) {
            const int16_t* xs = x[m].x + at + 4 * (Q * v + s);
            const __m256i pair = _mm256_add_epi32(_mm256_madd_epi16(q.even, broadcast(xs)),
                                                  _mm256_madd_epi16(q.odd, broadcast(xs + 2)));
            dot[p][half][m] = _mm256_add_epi32(dot[p][half][m], pair);
          }
        }
      }
    }
}

OMQ_INLINE void store_rows(float* y, __m256 v, int64_t live) {
  if (live >= 8) return _mm256_storeu_ps(y, v);
  float buffer[8];
  _mm256_storeu_ps(buffer, v);
  for (int64_t r = 0; r < live; ++r) y[r] = buffer[r];
}

template <int Bits, int P, int M>
void gemv_panels(const PanelView& w, const std::byte* rows, float* y, int64_t panel) {
  constexpr int Q = kQuads<Bits>;
  const int64_t row_bytes = prepared_bytes(w);
  Acts x[M];
  __m256 total[P][2][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = acts_at(w, rows + m * row_bytes);
    OMQ_UNROLL for (int p = 0; p < P; ++p) total[p][0][m] = total[p][1][m] = _mm256_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols, ++chunk) {
      const int64_t vectors = (min64(w.chunk_cols, b.padded - c) / 4 + Q - 1) / Q;
      __m256i dot[P][2][M];
      chunk_dots<Bits, P, M>(block + c / 8 * Block<Bits>::kLowBytes, block + b.high + 2 * c,
                             w.panel_bytes, vectors, x, chunk * w.chunk_stride, dot);
      OMQ_UNROLL for (int p = 0; p < P; ++p) OMQ_UNROLL for (int half = 0; half < 2; ++half) {
        const uint8_t* grid = block + b.grid + p * w.panel_bytes;
        const __m256 scale = load_f16(grid + 16 * half);
        const __m256i zero = _mm256_cvtps_epi32(zeros_at(w, grid, half));
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          const __m256i off = _mm256_mullo_epi32(zero, _mm256_set1_epi32(x[m].sum[chunk]));
          const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot[p][half][m], off));
          total[p][half][m] = _mm256_fmadd_ps(
              value, _mm256_mul_ps(scale, _mm256_set1_ps(x[m].scale[chunk])), total[p][half][m]);
        }
      }
    }
  }
  OMQ_UNROLL for (int p = 0; p < P; ++p) OMQ_UNROLL for (int m = 0; m < M; ++m) {
    const int64_t row = (panel + p) * kRows;
    store_rows(y + m * w.rows + row, total[p][0][m], w.rows - row);
    store_rows(y + m * w.rows + row + 8, total[p][1][m], w.rows - row - 8);
  }
}

template <int Bits, int P, int M>
OMQ_INLINE void gemv_range(const PanelView& w, const std::byte* x, float* y, int64_t panel,
                           int64_t end) {
  for (; panel + P <= end; panel += P) gemv_panels<Bits, P, M>(w, x, y, panel);
  for (; panel < end; ++panel) gemv_panels<Bits, 1, M>(w, x, y, panel);
}

// Registers: 2 · P · M sums of the 16, so more rows of x leave fewer streams.
template <int Bits>
void gemv_bits(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
               int64_t panel1) {
  const int64_t row_bytes = prepared_bytes(w);
  for (; m >= 4; m -= 4, x += 4 * row_bytes, y += 4 * w.rows)
    gemv_range<Bits, 1, 4>(w, x, y, panel0, panel1);
  if (m == 3) gemv_range<Bits, 1, 3>(w, x, y, panel0, panel1);
  if (m == 2) gemv_range<Bits, 2, 2>(w, x, y, panel0, panel1);
  if (m == 1) gemv_range<Bits, 4, 1>(w, x, y, panel0, panel1);
}

void gemv(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
          int64_t panel1) {
  switch (w.bits) {
    case 2:
      return gemv_bits<2>(w, x, m, y, panel0, panel1);
    case 3:
      return gemv_bits<3>(w, x, m, y, panel0, panel1);
    case 4:
      return gemv_bits<4>(w, x, m, y, panel0, panel1);
    default:
      return gemv_bits<8>(w, x, m, y, panel0, panel1);
  }
}

// ---- codes with codes, many rows of x ----
//
// An unpacked panel, chunk by chunk: I32 [16], the sums of the codes, then for each half its
// planes, 32 bytes a quad.

constexpr int64_t kQuadsInShort = 8;  // sums of so many quads stay in 16 bits

OMQ_INLINE int64_t planes_of(const PanelView& w) { return w.bits == 8 ? 2 : 1; }
OMQ_INLINE int64_t padded(const PanelView& w, int64_t cols) {
  return round_up(cols, w.bits == 8 ? 4 : w.bits == 4 ? 8 : 16);
}

int64_t unpacked_bytes(const PanelView& w) {
  const int64_t cols = (w.groups - 1) * padded(w, w.group_cols) + padded(w, w.last_cols);
  return 64 * w.chunks + planes_of(w) * kRows * cols;
}

template <int Bits>
OMQ_INLINE void unpack_half(const uint8_t* low, const uint8_t* high, int64_t quads, uint8_t* sums,
                            uint8_t* out) {
  constexpr int Q = kQuads<Bits>;
  const __m256i one8 = _mm256_set1_epi8(1), one16 = _mm256_set1_epi16(1),
                nibble = _mm256_set1_epi8(15);
  const auto store = [](uint8_t* at, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(at), v);
  };
  __m256i sum = _mm256_setzero_si256();
  for (int64_t q = 0; q < quads; low += 64, high += 32) {
    const __m256i v = load(low);
    OMQ_UNROLL for (int s = 0; s < Q; ++s, ++q) {
      const __m256i code = unpack_bytes<Bits>(v, high, s);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(code, one8), one16));
      if constexpr (Bits == 8) {
        store(out + 32 * q, _mm256_and_si256(code, nibble));
        store(out + 32 * (quads + q), _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble));
      } else {
        store(out + 32 * q, code);
      }
    }
  }
  store(sums, sum);
}

template <int Bits> void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols) {
      const int64_t quads = min64(w.chunk_cols, b.padded - c) / 4;
      const uint8_t* low = block + c / 8 * Block<Bits>::kLowBytes;
      const uint8_t* high = block + b.high + 2 * c;
      const int64_t half_bytes = 32 * planes_of(w) * quads;
      unpack_half<Bits>(low, high, quads, out, out + 64);
      unpack_half<Bits>(low + 32, high + 4, quads, out + 32, out + 64 + half_bytes);
      out += 64 + 2 * half_bytes;
    }
  }
}

void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  switch (w.bits) {
    case 2:
      return unpack_panel<2>(w, panel, out);
    case 3:
      return unpack_panel<3>(w, panel, out);
    case 4:
      return unpack_panel<4>(w, panel, out);
    default:
      return unpack_panel<8>(w, panel, out);
  }
}

// A row of prepare_codes (packed_isa.h).
struct Bytes {
  float scale;
  int32_t rest;
  const int32_t* sum;
  const int8_t* x;
};

OMQ_INLINE Bytes bytes_at(const PanelView& w, const std::byte* row) {
  Bytes b;
  __builtin_memcpy(&b.scale, row, 4);
  __builtin_memcpy(&b.rest, row + 4, 4);
  b.sum = reinterpret_cast<const int32_t*>(row + 64);
  b.x = reinterpret_cast<const int8_t*>(row + 64 + list_bytes(w));
  return b;
}

// Has v computed here: left alone, the compiler gathers the products of all quads before it adds
// them, and spills them.
OMQ_INLINE void settle(__m256i& v) { asm("" : "+x"(v)); }

// Σ code · byte of a panel with M rows of x, by halves, in 16 bits: quad q of one plane.
template <int M>
OMQ_INLINE void short_dots(const uint8_t* const (&codes)[2], const Bytes (&x)[M], int64_t at,
                           int64_t q, __m256i (&sum)[2][M]) {
  const __m256i low = load(codes[0] + 32 * q), high = load(codes[1] + 32 * q);
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    int32_t four;
    __builtin_memcpy(&four, x[m].x + at + 4 * q, 4);
    const __m256i xs = _mm256_set1_epi32(four);
    sum[0][m] = _mm256_add_epi16(sum[0][m], _mm256_maddubs_epi16(low, xs));
    sum[1][m] = _mm256_add_epi16(sum[1][m], _mm256_maddubs_epi16(high, xs));
    settle(sum[0][m]);
    settle(sum[1][m]);
  }
}

template <int M> OMQ_INLINE void clear(__m256i (&v)[2][M]) {
  OMQ_UNROLL for (int m = 0; m < M; ++m) v[0][m] = v[1][m] = _mm256_setzero_si256();
}
template <int M> OMQ_INLINE void widen_into(__m256i (&dot)[2][M], const __m256i (&sum)[2][M]) {
  const __m256i one = _mm256_set1_epi16(1);
  OMQ_UNROLL for (int h = 0; h < 2; ++h) OMQ_UNROLL for (int m = 0; m < M; ++m) dot[h][m] =
      _mm256_add_epi32(dot[h][m], _mm256_madd_epi16(sum[h][m], one));
}

template <int M>
OMQ_INLINE void nibble_dots(const uint8_t* const (&codes)[2], int64_t quads, const Bytes (&x)[M],
                            int64_t at, __m256i (&dot)[2][M]) {
  clear(dot);
  __m256i sum[2][M];
  int64_t q = 0;
  for (; q + kQuadsInShort <= quads; q += kQuadsInShort) {
    clear(sum);
    OMQ_UNROLL for (int64_t i = 0; i < kQuadsInShort; ++i) short_dots(codes, x, at, q + i, sum);
    widen_into(dot, sum);
  }
  clear(sum);
  for (; q < quads; ++q) short_dots(codes, x, at, q, sum);
  widen_into(dot, sum);
}

// y of one panel for M rows of x.
template <int M>
void gemm_panel(const PanelView& w, const uint8_t* unpacked, int64_t panel, const std::byte* rows,
                float* y) {
  const int64_t row_bytes = prepared_codes_bytes(w), planes = planes_of(w);
  Bytes x[M];
  __m256 total[2][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = bytes_at(w, rows + m * row_bytes);
    total[0][m] = total[1][m] = _mm256_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const int64_t cols = padded(w, g + 1 < w.groups ? w.group_cols : w.last_cols);
    const uint8_t* grid = block + cols * kRows * w.bits / 8;
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk) {
      const int64_t quads = min64(w.chunk_cols, cols - c) / 4, at = chunk * w.chunk_stride;
      const uint8_t* const low[2] = {unpacked + 64, unpacked + 64 + 32 * planes * quads};
      __m256i dot[2][M];
      nibble_dots(low, quads, x, at, dot);
      if (planes == 2) {
        const uint8_t* const high[2] = {low[0] + 32 * quads, low[1] + 32 * quads};
        __m256i upper[2][M];
        nibble_dots(high, quads, x, at, upper);
        OMQ_UNROLL for (int h = 0; h < 2; ++h) OMQ_UNROLL for (int m = 0; m < M; ++m) dot[h][m] =
            _mm256_add_epi32(dot[h][m], _mm256_slli_epi32(upper[h][m], 4));
      }
      OMQ_UNROLL for (int h = 0; h < 2; ++h) {
        const __m256 scale = load_f16(grid + 16 * h);
        const __m256i zero = _mm256_cvtps_epi32(zeros_at(w, grid, h));
        // Σ (code − zero), the surplus columns adding nothing.
        const __m256i codes = _mm256_sub_epi32(
            load(unpacked + 32 * h),
            _mm256_mullo_epi32(zero, _mm256_set1_epi32(static_cast<int32_t>(4 * quads))));
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          const __m256i off =
              _mm256_add_epi32(_mm256_mullo_epi32(zero, _mm256_set1_epi32(x[m].sum[chunk])),
                               _mm256_mullo_epi32(codes, _mm256_set1_epi32(x[m].rest)));
          total[h][m] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(dot[h][m], off)),
                              _mm256_mul_ps(scale, _mm256_set1_ps(x[m].scale)), total[h][m]);
        }
      }
      unpacked += 64 * (1 + planes * quads);
    }
  }
  const int64_t row = panel * kRows;
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    store_rows(y + m * w.rows + row, total[0][m], w.rows - row);
    store_rows(y + m * w.rows + row + 8, total[1][m], w.rows - row - 8);
  }
}

// A panel stays in the first-level cache while all rows of x pass by, 4 at once: 8 sums of the 16
// registers.
void gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte* scratch) {
  auto* unpacked = reinterpret_cast<uint8_t*>(scratch);
  const int64_t row_bytes = prepared_codes_bytes(w);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    unpack_panel(w, panel, unpacked);
    for (int64_t i = 0; i < m;) {
      const int64_t take = m - i >= 4 ? 4 : m - i;
      const auto multiply = take == 4   ? gemm_panel<4>
                            : take == 3 ? gemm_panel<3>
                            : take == 2 ? gemm_panel<2>
                                        : gemm_panel<1>;
      multiply(w, unpacked, panel, x + i * row_bytes, y + i * w.rows);
      i += take;
    }
  }
}

// ---- dequantise ----

template <int Bits>
void dequantize_half(const PanelView& w, const uint8_t* block, int64_t g, int half, float* out,
                     int64_t ld) {
  constexpr int Q = kQuads<Bits>;
  const Block<Bits> b(w, g);
  const __m256i low16 = _mm256_set1_epi32(0xffff);
  const __m256 scale = load_f16(block + b.grid + 16 * half);
  const __m256 zero = zeros_at(w, block + b.grid, half);
  for (int64_t v = 0; 4 * Q * v < b.cols; ++v) {
    const __m256i codes = load(block + 64 * v + 32 * half);
    OMQ_UNROLL for (int s = 0; s < Q; ++s) {
      const Pairs q = unpack<Bits>(codes, block + b.high + 32 * v + 4 * half, s);
      const __m256i column[4] = {_mm256_and_si256(q.even, low16), _mm256_and_si256(q.odd, low16),
                                 _mm256_srli_epi32(q.even, 16), _mm256_srli_epi32(q.odd, 16)};
      const int64_t first = 4 * (Q * v + s), live = min64(4, b.cols - first);
      for (int64_t j = 0; j < live; ++j)
        _mm256_storeu_ps(out + (first + j) * ld,
                         _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_cvtepi32_ps(column[j]), zero)));
    }
  }
}

template <int Bits>
void dequantize_bits(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes, out += w.group_cols * ld) {
    dequantize_half<Bits>(w, block, g, 0, out, ld);
    dequantize_half<Bits>(w, block, g, 1, out + 8, ld);
  }
}

void dequantize(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  switch (w.bits) {
    case 2:
      return dequantize_bits<2>(w, panel, out, ld);
    case 3:
      return dequantize_bits<3>(w, panel, out, ld);
    case 4:
      return dequantize_bits<4>(w, panel, out, ld);
    default:
      return dequantize_bits<8>(w, panel, out, ld);
  }
}

// ---- dense weights ----

constexpr int64_t kFloatBytes[] = {4, 2, 2};  // by Stored

template <Stored T> OMQ_INLINE __m256 load_wide(const uint8_t* at) {
  if constexpr (T == Stored::F32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  } else if constexpr (T == Stored::F16) {
    return load_f16(at);
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

// The last n < 8 values, zeros behind them.
template <Stored T> OMQ_INLINE __m256 load_tail(const uint8_t* at, int64_t n) {
  uint8_t buffer[32] = {};
  __builtin_memcpy(buffer, at, static_cast<size_t>(n * kFloatBytes[static_cast<int>(T)]));
  return load_wide<T>(buffer);
}

OMQ_INLINE float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <Stored T, int R, int M>
OMQ_INLINE void dense_rows(const DenseView& w, const float* x, float* y, int64_t row) {
  constexpr int64_t kBytes = kFloatBytes[static_cast<int>(T)];
  const uint8_t* base = static_cast<const uint8_t*>(w.data) + row * w.cols * kBytes;
  __m256 sum[R][M];
  OMQ_UNROLL for (int r = 0; r < R; ++r) OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] =
      _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= w.cols; k += 8) OMQ_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* at = base + (r * w.cols + k) * kBytes;
      _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
      const __m256 ws = load_wide<T>(at);
      OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] =
          _mm256_fmadd_ps(ws, _mm256_loadu_ps(x + m * w.cols + k), sum[r][m]);
    }
  if (k < w.cols) OMQ_UNROLL for (int r = 0; r < R; ++r) {
      const __m256 ws = load_tail<T>(base + (r * w.cols + k) * kBytes, w.cols - k);
      OMQ_UNROLL for (int m = 0; m < M; ++m) {
        const uint8_t* xs = reinterpret_cast<const uint8_t*>(x + m * w.cols + k);
        sum[r][m] = _mm256_fmadd_ps(ws, load_tail<Stored::F32>(xs, w.cols - k), sum[r][m]);
      }
    }
  OMQ_UNROLL for (int r = 0; r < R; ++r) OMQ_UNROLL for (int m = 0; m < M; ++m)
      y[m * w.rows + row + r] = sum_of(sum[r][m]);
}

template <Stored T, int M>
OMQ_INLINE void dense_range(const DenseView& w, const float* x, float* y, int64_t row,
                            int64_t end) {
  constexpr int R = M == 1 ? 4 : 2;
  for (; row + R <= end; row += R) dense_rows<T, R, M>(w, x, y, row);
  for (; row < end; ++row) dense_rows<T, 1, M>(w, x, y, row);
}

template <Stored T>
void dense_type(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                int64_t row1) {
  for (; m >= 4; m -= 4, x += 4 * w.cols, y += 4 * w.rows) dense_range<T, 4>(w, x, y, row0, row1);
  for (; m >= 1; m -= 1, x += w.cols, y += w.rows) dense_range<T, 1>(w, x, y, row0, row1);
}

void dense_gemv(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                int64_t row1) {
  switch (w.type) {
    case Stored::F32:
      return dense_type<Stored::F32>(w, x, m, y, row0, row1);
    case Stored::BF16:
      return dense_type<Stored::BF16>(w, x, m, y, row0, row1);
    case Stored::F16:
      return dense_type<Stored::F16>(w, x, m, y, row0, row1);
  }
}

template <Stored T> void widen_type(const void* values, float* out, int64_t n) {
  constexpr int64_t kBytes = kFloatBytes[static_cast<int>(T)];
  const uint8_t* at = static_cast<const uint8_t*>(values);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_wide<T>(at + i * kBytes));
  if (i < n) store_rows(out + i, load_tail<T>(at + i * kBytes, n - i), n - i);
}

void widen(const void* values, Stored type, float* out, int64_t n) {
  switch (type) {
    case Stored::F32:
      return widen_type<Stored::F32>(values, out, n);
    case Stored::BF16:
      return widen_type<Stored::BF16>(values, out, n);
    case Stored::F16:
      return widen_type<Stored::F16>(values, out, n);
  }
}

}  // namespace

const PackedIsa kAvx2Isa = {
    .name = "avx2",
    .runs_here = runs_here,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .gemv = gemv,
    .gemv_for_many_rows = false,
    .prepare_codes_for_gemv = prepare_codes_for_gemv,
    .gemm_codes = gemm_codes,
    .unpacked_bytes = unpacked_bytes,
    .dequantize = dequantize,
    .dense_gemv = dense_gemv,
    .widen = widen,
};

}  // namespace omq::cpu
