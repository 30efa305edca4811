// The packed kernels' inner loops for AVX-512 with VNNI. Table and contract: packed_isa.h; layout:
// tensor/packed.h.
//
// gemv: a row of x becomes, chunk by chunk (≤ 128 columns of one group), whole numbers of 15 bits
// and one scale, stored as two planes of signed bytes, x ≈ s · (256·hi + lo): relative error 2e-5,
// so 16-bit activations stay what they are. The codes are VNNI's unsigned operand; a quad (16 rows
// × 4 columns) meets 4 bytes of x, broadcast. With whole zero points the chunk's sum Σ(code −
// zero)·x is exact in int32 and is scaled once. Several panels are walked at once: each is a memory
// stream of its own, prefetched ahead, and one stream alone does not fill the memory bus. A row of
// x that comes as codes takes the same loops, its codes less their zero point being the whole
// numbers.
//
// gemm_codes: many rows of codes. One signed byte holds a code less an offset, so one plane does;
// panels are unpacked to bytes once.
//
// Compiled with this instruction set's flags: no standard or project header with inline functions
// may be included.
#include <immintrin.h>

#include "tensor/cpu/packed_isa.h"

#define OMQ_INLINE __attribute__((always_inline)) inline
#define OMQ_UNROLL _Pragma("GCC unroll 16")

namespace omq::cpu {

namespace {

constexpr int64_t kRows = 16;             // of a panel
constexpr float kActMax = 32512.0f;       // 256 · 127: hi stays a signed byte
constexpr int64_t kPrefetchBytes = 1536;  // ahead in each stream

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

OMQ_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
OMQ_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

OMQ_INLINE void prefetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T0);
}

// ---- prepared activations: one row = scales, sums, hi plane, lo plane, each padded to 64 bytes
// ----

struct Acts {
  const float* scale;     // [chunks]
  const int32_t* sum;     // [chunks] Σ of the whole numbers
  const int8_t *hi, *lo;  // [chunks, chunk_stride]
};

OMQ_INLINE int64_t list_bytes(const PanelView& w) { return round_up(w.chunks * 4, 64); }
OMQ_INLINE int64_t plane_bytes(const PanelView& w) {
  return round_up(w.chunks * w.chunk_stride, 64);
}

int64_t prepared_bytes(const PanelView& w) { return 2 * list_bytes(w) + 2 * plane_bytes(w); }

OMQ_INLINE Acts acts_at(const PanelView& w, const std::byte* row) {
  const std::byte* planes = row + 2 * list_bytes(w);
  return {reinterpret_cast<const float*>(row),
          reinterpret_cast<const int32_t*>(row + list_bytes(w)),
          reinterpret_cast<const int8_t*>(planes),
          reinterpret_cast<const int8_t*>(planes + plane_bytes(w))};
}

OMQ_INLINE __mmask16 first(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}

// One chunk of n columns; the planes are written to the end of the chunk's slot, zeros past n. A
// value that is not finite makes the scale NaN, so that it shows in every output that it touches.
void prepare_chunk(const float* x, int64_t n, int64_t slot, float* scale, int32_t* sum, int8_t* hi,
                   int8_t* lo) {
  __m512 top = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 a = _mm512_abs_ps(_mm512_maskz_loadu_ps(first(n - i), x + i));
    bad = static_cast<__mmask16>(bad |
                                 _mm512_cmp_ps_mask(a, _mm512_set1_ps(__FLT_MAX__), _CMP_NLE_UQ));
    top = _mm512_max_ps(top, a);
  }
  const float peak = _mm512_reduce_max_ps(top);
  const bool flat = bad != 0 || peak < 1e-30f;  // below: 1 / scale would overflow
  *scale = bad ? __builtin_nanf("") : flat ? 0.0f : peak / kActMax;
  const __m512 inverse = _mm512_set1_ps(flat ? 0.0f : kActMax / peak);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < slot; i += 16) {
    const __mmask16 live = flat || i >= n ? 0 : first(n - i);
    const __m512 a = _mm512_maskz_loadu_ps(live, x + (i < n ? i : 0));
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
    const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hi + i), _mm512_cvtepi32_epi8(h));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lo + i), _mm512_cvtepi32_epi8(v));
    total = _mm512_add_epi32(total, v);
  }
  *sum = _mm512_reduce_add_epi32(total);
}

void prepare(const PanelView& w, const float* x, std::byte* out) {
  const Acts a = acts_at(w, out);
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t cols = g + 1 < w.groups ? w.group_cols : w.last_cols;
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk)
      prepare_chunk(x + g * w.group_cols + c, min64(w.chunk_cols, cols - c), w.chunk_stride,
                    const_cast<float*>(a.scale) + chunk, const_cast<int32_t*>(a.sum) + chunk,
                    const_cast<int8_t*>(a.hi) + chunk * w.chunk_stride,
                    const_cast<int8_t*>(a.lo) + chunk * w.chunk_stride);
  }
}

// One chunk of whole numbers from codes, as prepare_chunk.
void prepare_chunk(const uint8_t* codes, int32_t zero, int64_t n, int64_t slot, int32_t* sum,
                   int8_t* hi, int8_t* lo) {
  int32_t total = 0;
  for (int64_t i = 0; i < slot; ++i) {
    const int32_t whole = i < n ? codes[i] - zero : 0;
    hi[i] = static_cast<int8_t>((whole + 128) >> 8);
    lo[i] = static_cast<int8_t>(whole & 255);
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
                    const_cast<int8_t*>(a.hi) + chunk * w.chunk_stride,
                    const_cast<int8_t*>(a.lo) + chunk * w.chunk_stride);
    }
  }
}

// ---- unpacking: one 64-byte vector (and, for 3 bits, its high bits) into quads of bytes ----

template <int Bits>
inline constexpr int kQuads = Bits == 8 ? 1 : (Bits == 4 ? 2 : 4);  // in one 64-byte vector

// Narrow codes cost more to unpack than to multiply. With Scaled the odd quads stay two bits up, 4
// · code, which saves half of the shifts; their sums are kept apart and shifted back once a chunk.
template <int Bits, bool Scaled>
OMQ_INLINE void unpack(const uint8_t* low, const uint8_t* high, __m512i* quad) {
  const __m512i v = _mm512_loadu_si512(low);
  if constexpr (Bits == 8) {
    quad[0] = v;
  } else if constexpr (Bits == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    quad[0] = _mm512_and_si512(v, mask);
    quad[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
  } else {
    const __m512i even = _mm512_set1_epi8(3), odd = _mm512_set1_epi8(Scaled ? 12 : 3);
    const __m512i v4 = _mm512_srli_epi16(v, 4);
    quad[0] = _mm512_and_si512(v, even);
    quad[1] = _mm512_and_si512(Scaled ? v : _mm512_srli_epi16(v, 2), odd);
    quad[2] = _mm512_and_si512(v4, even);
    quad[3] = _mm512_and_si512(Scaled ? v4 : _mm512_srli_epi16(v, 6), odd);
    if constexpr (Bits == 3) {
      OMQ_UNROLL for (int s = 0; s < 4; ++s) {
        const __m512i third_bit = _mm512_set1_epi8(Scaled && s % 2 == 1 ? 16 : 4);
        uint64_t rows_that_have_it;
        __builtin_memcpy(&rows_that_have_it, high + 8 * s, 8);
        quad[s] =
            _mm512_mask_add_epi8(quad[s], _cvtu64_mask64(rows_that_have_it), quad[s], third_bit);
      }
    }
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

OMQ_INLINE __m512 load_f16(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
OMQ_INLINE __m512i zeros_at(const PanelView& w, const uint8_t* grid) {
  return w.symmetric ? _mm512_set1_epi32(1 << (w.bits - 1))
                     : _mm512_cvtps_epi32(load_f16(grid + 2 * kRows));
}
OMQ_INLINE __m512i broadcast(const int8_t* x) {
  int32_t four_columns;
  __builtin_memcpy(&four_columns, x, 4);
  return _mm512_set1_epi32(four_columns);
}

// ---- y for P panels (streams) and M rows of x at once ----

// Integer sums of one chunk. Registers: 2 · P · M of the 32 without Scaled, twice that with it.
template <int Bits, int P, int M> struct Sums {
  static constexpr bool kScaled = Bits <= 3 && M == 1;
  static constexpr int kKinds = kScaled ? 2 : 1;  // of codes: as they are, 4 times
  __m512i hi[P][M][kKinds], lo[P][M][kKinds];

  OMQ_INLINE void clear() {
    OMQ_UNROLL for (int p = 0; p < P; ++p) {
      OMQ_UNROLL for (int m = 0; m < M; ++m) {
        OMQ_UNROLL for (int k = 0; k < kKinds; ++k) {
          hi[p][m][k] = lo[p][m][k] = _mm512_setzero_si512();
        }
      }
    }
  }
  OMQ_INLINE void add(int p, int m, int quad, __m512i codes, __m512i x_hi, __m512i x_lo) {
    const int k = quad % kKinds;
    hi[p][m][k] = _mm512_dpbusd_epi32(hi[p][m][k], codes, x_hi);
    lo[p][m][k] = _mm512_dpbusd_epi32(lo[p][m][k], codes, x_lo);
  }
  OMQ_INLINE __m512i join(int p, int m, int k) const {
    return _mm512_add_epi32(_mm512_slli_epi32(hi[p][m][k], 8), lo[p][m][k]);
  }
  // Σ code · x, 16 rows.
  OMQ_INLINE __m512i dot(int p, int m) const {
    if constexpr (!kScaled) return join(p, m, 0);
    return _mm512_add_epi32(join(p, m, 0), _mm512_srai_epi32(join(p, m, kKinds - 1), 2));
  }
};

template <int Bits, int P, int M>
OMQ_INLINE void chunk_sums(const uint8_t* low, const uint8_t* high, int64_t stream_bytes,
                           int64_t vectors, const Acts (&x)[M], int64_t at,
                           Sums<Bits, P, M>& sums) {
  constexpr int Q = kQuads<Bits>;
  sums.clear();
  for (int64_t v = 0; v < vectors; ++v) {
    OMQ_UNROLL for (int p = 0; p < P; ++p) {
      const uint8_t* lp = low + p * stream_bytes + v * 64;
      const uint8_t* hp = high + p * stream_bytes + v * 32;
      if constexpr (M <= 2) {
        prefetch(lp);
        if constexpr (Bits == 3) prefetch(hp);
      }
      __m512i quad[Q];
      unpack<Bits, Sums<Bits, P, M>::kScaled>(lp, hp, quad);
      OMQ_UNROLL for (int s = 0; s < Q; ++s) {
        const int64_t byte = at + 4 * (Q * v + s);
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          sums.add(p, m, s, quad[s], broadcast(x[m].hi + byte), broadcast(x[m].lo + byte));
        }
      }
    }
  }
}

// Panels panel, panel + stride, … : P streams.
template <int Bits, int P, int M>
void gemv_panels(const PanelView& w, const std::byte* rows, float* y, int64_t panel,
                 int64_t stride) {
  constexpr int Q = kQuads<Bits>;
  const int64_t row_bytes = prepared_bytes(w), stream_bytes = stride * w.panel_bytes;
  Acts x[M];
  __m512 total[P][M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = acts_at(w, rows + m * row_bytes);
    OMQ_UNROLL for (int p = 0; p < P; ++p) total[p][m] = _mm512_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols, ++chunk) {
      const int64_t vectors = (min64(w.chunk_cols, b.padded - c) / 4 + Q - 1) / Q;
      Sums<Bits, P, M> sums;
      chunk_sums<Bits, P, M>(block + c / 8 * Block<Bits>::kLowBytes, block + b.high + 2 * c,
                             stream_bytes, vectors, x, chunk * w.chunk_stride, sums);
      OMQ_UNROLL for (int p = 0; p < P; ++p) {
        const uint8_t* grid = block + b.grid + p * stream_bytes;
        prefetch(grid);
        const __m512 scale = load_f16(grid);
        const __m512i zero = zeros_at(w, grid);
        OMQ_UNROLL for (int m = 0; m < M; ++m) {
          const __m512i off = _mm512_mullo_epi32(zero, _mm512_set1_epi32(x[m].sum[chunk]));
          const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums.dot(p, m), off));
          total[p][m] = _mm512_fmadd_ps(
              value, _mm512_mul_ps(scale, _mm512_set1_ps(x[m].scale[chunk])), total[p][m]);
        }
      }
    }
  }
  OMQ_UNROLL for (int p = 0; p < P; ++p) {
    const int64_t row = (panel + p * stride) * kRows;
    OMQ_UNROLL for (int m = 0; m < M; ++m) {
      _mm512_mask_storeu_ps(y + m * w.rows + row, first(w.rows - row), total[p][m]);
    }
  }
}

// Each stream takes a run of neighbouring panels, so that prefetching past a panel's end reaches
// what is read next.
template <int Bits, int P, int M>
OMQ_INLINE void gemv_range(const PanelView& w, const std::byte* x, float* y, int64_t panel,
                           int64_t end) {
  const int64_t run = (end - panel) / P;
  for (int64_t i = 0; i < run; ++i) gemv_panels<Bits, P, M>(w, x, y, panel + i, run);
  for (panel += P * run; panel < end; ++panel) gemv_panels<Bits, 1, M>(w, x, y, panel, 0);
}

template <int Bits>
void gemv_bits(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
               int64_t panel1) {
  const int64_t row_bytes = prepared_bytes(w);
  for (; m >= 4; m -= 4, x += 4 * row_bytes, y += 4 * w.rows)
    gemv_range<Bits, 2, 4>(w, x, y, panel0, panel1);
  if (m == 3) gemv_range<Bits, 2, 3>(w, x, y, panel0, panel1);
  if (m == 2) gemv_range<Bits, 4, 2>(w, x, y, panel0, panel1);
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
// An unpacked panel, chunk by chunk: I32 [16], the sums of the codes, then 64 bytes a quad.

OMQ_INLINE int64_t padded(const PanelView& w, int64_t cols) {
  return round_up(cols, w.bits == 8 ? 4 : w.bits == 4 ? 8 : 16);
}

int64_t unpacked_bytes(const PanelView& w) {
  const int64_t cols = (w.groups - 1) * padded(w, w.group_cols) + padded(w, w.last_cols);
  return 64 * w.chunks + kRows * cols;
}

template <int Bits> void unpack_panel(const PanelView& w, int64_t panel, uint8_t* out) {
  constexpr int Q = kQuads<Bits>;
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const Block<Bits> b(w, g);
    for (int64_t c = 0; c < b.cols; c += w.chunk_cols) {
      const int64_t quads = min64(w.chunk_cols, b.padded - c) / 4;
      const uint8_t* low = block + c / 8 * Block<Bits>::kLowBytes;
      const uint8_t* high = block + b.high + 2 * c;
      uint8_t* to = out + 64;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t q = 0; q < quads; q += Q, low += 64, high += 32) {
        __m512i quad[Q];
        unpack<Bits, false>(low, high, quad);
        OMQ_UNROLL for (int s = 0; s < Q; ++s, to += 64) {
          sum = _mm512_dpbusd_epi32(sum, quad[s], _mm512_set1_epi8(1));
          _mm512_store_si512(to, quad[s]);
        }
      }
      _mm512_store_si512(out, sum);
      out = to;
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

// y of one panel for M rows of x.
template <int M>
void gemm_panel(const PanelView& w, const uint8_t* unpacked, int64_t panel, const std::byte* rows,
                float* y) {
  const int64_t row_bytes = prepared_codes_bytes(w);
  Bytes x[M];
  __m512 total[M];
  OMQ_UNROLL for (int m = 0; m < M; ++m) {
    x[m] = bytes_at(w, rows + m * row_bytes);
    total[m] = _mm512_setzero_ps();
  }
  const uint8_t* block = w.data + panel * w.panel_bytes;
  int64_t chunk = 0;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes) {
    const int64_t cols = padded(w, g + 1 < w.groups ? w.group_cols : w.last_cols);
    const uint8_t* grid = block + cols * kRows * w.bits / 8;
    const __m512 scale = load_f16(grid);
    const __m512i zero = zeros_at(w, grid);
    for (int64_t c = 0; c < cols; c += w.chunk_cols, ++chunk) {
      const int64_t quads = min64(w.chunk_cols, cols - c) / 4, at = chunk * w.chunk_stride;
      __m512i dot[M];
      OMQ_UNROLL for (int m = 0; m < M; ++m) dot[m] = _mm512_setzero_si512();
      for (int64_t q = 0; q < quads; ++q) {
        const __m512i codes = _mm512_load_si512(unpacked + 64 * (1 + q));
        OMQ_UNROLL for (int m = 0; m < M; ++m) dot[m] =
            _mm512_dpbusd_epi32(dot[m], codes, broadcast(x[m].x + at + 4 * q));
      }
      // Σ (code − zero), the surplus columns adding nothing.
      const __m512i code_sum = _mm512_sub_epi32(
          _mm512_load_si512(unpacked),
          _mm512_mullo_epi32(zero, _mm512_set1_epi32(static_cast<int32_t>(4 * quads))));
      OMQ_UNROLL for (int m = 0; m < M; ++m) {
        const __m512i off =
            _mm512_add_epi32(_mm512_mullo_epi32(zero, _mm512_set1_epi32(x[m].sum[chunk])),
                             _mm512_mullo_epi32(code_sum, _mm512_set1_epi32(x[m].rest)));
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(dot[m], off)),
                                   _mm512_mul_ps(scale, _mm512_set1_ps(x[m].scale)), total[m]);
      }
      unpacked += 64 * (1 + quads);
    }
  }
  const int64_t row = panel * kRows;
  OMQ_UNROLL for (int m = 0; m < M; ++m)
      _mm512_mask_storeu_ps(y + m * w.rows + row, first(w.rows - row), total[m]);
}

// A panel stays in the first-level cache while all rows of x pass by, 12 at once: as many sums keep
// both multipliers busy through their latency.
void gemm_codes(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                int64_t panel1, std::byte* scratch) {
  auto* unpacked = reinterpret_cast<uint8_t*>(scratch);
  const int64_t row_bytes = prepared_codes_bytes(w);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    unpack_panel(w, panel, unpacked);
    for (int64_t i = 0; i < m;) {
      const int64_t left = m - i, take = left >= 12 ? 12 : left >= 6 ? 6 : left >= 3 ? 3 : 1;
      const auto multiply = take == 12  ? gemm_panel<12>
                            : take == 6 ? gemm_panel<6>
                            : take == 3 ? gemm_panel<3>
                                        : gemm_panel<1>;
      multiply(w, unpacked, panel, x + i * row_bytes, y + i * w.rows);
      i += take;
    }
  }
}

// ---- dequantise ----

template <int Bits>
void dequantize_bits(const PanelView& w, int64_t panel, float* out, int64_t ld) {
  constexpr int Q = kQuads<Bits>;
  const __m512i byte = _mm512_set1_epi32(255);
  const uint8_t* block = w.data + panel * w.panel_bytes;
  for (int64_t g = 0; g < w.groups; ++g, block += w.block_bytes, out += w.group_cols * ld) {
    const Block<Bits> b(w, g);
    const __m512 scale = load_f16(block + b.grid);
    const __m512 zero = _mm512_cvtepi32_ps(zeros_at(w, block + b.grid));
    for (int64_t v = 0; 4 * Q * v < b.cols; ++v) {
      __m512i quad[Q];
      unpack<Bits, false>(block + 64 * v, block + b.high + 32 * v, quad);
      OMQ_UNROLL for (int s = 0; s < Q; ++s) {
        const int64_t col = 4 * (Q * v + s);
        const int64_t live = min64(4, b.cols - col);
        for (int64_t j = 0; j < live; ++j, quad[s] = _mm512_srli_epi32(quad[s], 8)) {
          const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(quad[s], byte));
          _mm512_storeu_ps(out + (col + j) * ld, _mm512_mul_ps(scale, _mm512_sub_ps(code, zero)));
        }
      }
    }
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

template <Stored T> OMQ_INLINE __m512 load_wide(const uint8_t* at, __mmask16 live) {
  if constexpr (T == Stored::F32) {
    return _mm512_maskz_loadu_ps(live, at);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(live, at);
    if constexpr (T == Stored::F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

template <Stored T, int R, int M>
OMQ_INLINE void dense_rows(const DenseView& w, const float* x, float* y, int64_t row) {
  constexpr int64_t kBytes = kFloatBytes[static_cast<int>(T)];
  const uint8_t* base = static_cast<const uint8_t*>(w.data) + row * w.cols * kBytes;
  __m512 sum[R][M];
  OMQ_UNROLL for (int r = 0; r < R; ++r) OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] =
      _mm512_setzero_ps();
  for (int64_t k = 0; k < w.cols; k += 16) {
    const __mmask16 live = first(w.cols - k);
    __m512 xs[M];
    OMQ_UNROLL for (int m = 0; m < M; ++m) xs[m] = _mm512_maskz_loadu_ps(live, x + m * w.cols + k);
    OMQ_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* at = base + (r * w.cols + k) * kBytes;
      prefetch(at);
      const __m512 ws = load_wide<T>(at, live);
      OMQ_UNROLL for (int m = 0; m < M; ++m) sum[r][m] = _mm512_fmadd_ps(ws, xs[m], sum[r][m]);
    }
  }
  OMQ_UNROLL for (int r = 0; r < R; ++r) OMQ_UNROLL for (int m = 0; m < M; ++m)
      y[m * w.rows + row + r] = _mm512_reduce_add_ps(sum[r][m]);
}

template <Stored T, int M>
OMQ_INLINE void dense_range(const DenseView& w, const float* x, float* y, int64_t row,
                            int64_t end) {
  for (; row + 4 <= end; row += 4) dense_rows<T, 4, M>(w, x, y, row);
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
  const uint8_t* at = static_cast<const uint8_t*>(values);
  for (int64_t i = 0; i < n; i += 16)
    _mm512_mask_storeu_ps(out + i, first(n - i),
                          load_wide<T>(at + i * kFloatBytes[static_cast<int>(T)], first(n - i)));
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

const PackedIsa kAvx512Isa = {
    .name = "avx512",
    .runs_here = runs_here,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .gemv = gemv,
    .gemv_for_many_rows = true,
    .prepare_codes_for_gemv = prepare_codes_for_gemv,
    .gemm_codes = gemm_codes,
    .unpacked_bytes = unpacked_bytes,
    .dequantize = dequantize,
    .dense_gemv = dense_gemv,
    .widen = widen,
};

}  // namespace omq::cpu
