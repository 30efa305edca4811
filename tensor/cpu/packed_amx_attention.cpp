// Attention of many queries by AMX's tiles of bf16 (PackedIsa::attention_tile).
//
// A float goes as two halves of bf16, x = hi + lo, of which 2⁻¹⁶ is lost; a product of two is hi·hi
// + hi·lo + lo·hi, added up in F32. Three multiplications of tiles do what 24 vectors of
// multiply-adds in F32 do. Keys and values are cut up once for all queries that see them; 32
// queries meet them at a time, so that their scores and probabilities lie in the caches.
//
// Compiled with this instruction set's flags: see packed_isa.h.
#include "tensor/cpu/packed_amx.h"

namespace omq::cpu {

namespace {

constexpr int64_t kStrips = kAttentionQueries / kTileRows;  // of 16 queries
constexpr int64_t kPairCols = 32;                           // a tile's row of bf16

// Both with their bf16 in the upper 16 bits, where the bits below mean nothing. (Only hi is
// rounded: a NaN survives in lo.)
struct Halves {
  __m512i hi, lo;
};
OMQ_INLINE Halves halves_of(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i hi = _mm512_and_si512(up, _mm512_set1_epi32(-65536));
  return {hi, _mm512_castps_si512(_mm512_sub_ps(x, _mm512_castsi512_ps(hi)))};
}

// 16 of them next to each other.
OMQ_INLINE void store_row(std::byte* out, __m512i half) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(out),
                     _mm512_cvtepi32_epi16(_mm512_srli_epi32(half, 16)));
}

// Two rows, number by number.
OMQ_INLINE void store_pairs(std::byte* out, __m512i first_row, __m512i second_row) {
  _mm512_store_si512(out, _mm512_or_si512(_mm512_srli_epi32(first_row, 16),
                                          _mm512_and_si512(second_row, _mm512_set1_epi32(-65536))));
}

// ---- keys and values ----

// Keys: for each 16 of them and 32 columns a tile of the high halves and one of the low, 16 pairs
// of columns × 16 keys. Values: for each 32 of them and 16 columns the same, 16 pairs of values ×
// 16 columns. Keys and values past the last are 0.
OMQ_INLINE int64_t values_at(int64_t keys, int64_t d) { return round_up(keys, kPairCols) * d * 4; }

void key_tiles(const float* k, int64_t row, int64_t count, int64_t d, std::byte* out) {
  for (int64_t c = 0; c < d; c += kPairCols, out += 2 * kTileSize)
    for (int64_t key = 0; key < kTileRows; ++key) {
      alignas(64) uint32_t pairs[2][16] = {};
      if (key < count)
        for (int64_t i = 0; i < 2; ++i) {
          const Halves x = halves_of(_mm512_loadu_ps(k + key * row + c + 16 * i));
          store_row(reinterpret_cast<std::byte*>(pairs[0] + 8 * i), x.hi);
          store_row(reinterpret_cast<std::byte*>(pairs[1] + 8 * i), x.lo);
        }
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t i = 0; i < 16; ++i)
          __builtin_memcpy(out + half * kTileSize + 64 * i + 4 * key, &pairs[half][i], 4);
    }
}

void value_tiles(const float* v, int64_t row, int64_t count, int64_t d, std::byte* out) {
  for (int64_t c = 0; c < d; c += 16, out += 2 * kTileSize)
    for (int64_t pair = 0; pair < 16; ++pair) {
      Halves x[2];
      OMQ_UNROLL for (int i = 0; i < 2; ++i) {
        const __mmask16 there = 2 * pair + i < count ? 0xffff : 0;
        x[i] = halves_of(_mm512_maskz_loadu_ps(there, v + (2 * pair + i) * row + c));
      }
      store_pairs(out + 64 * pair, x[0].hi, x[1].hi);
      store_pairs(out + kTileSize + 64 * pair, x[0].lo, x[1].lo);
    }
}

// ---- queries ----

struct Scratch {
  std::byte *q, *p;  // tiles of both halves: [strip, columns / 32], [strip, keys / 32]
  float *scores, *out;
  int64_t score_row;
};
// (Rows of scores lie a little more than a power of two apart.)
OMQ_INLINE int64_t score_row_of(int64_t padded_keys) { return padded_keys + 16; }
OMQ_INLINE Scratch scratch_at(std::byte* memory, int64_t padded_keys, int64_t d) {
  Scratch s;
  s.q = memory;
  s.p = s.q + kStrips * d / kPairCols * 2 * kTileSize;
  s.out = reinterpret_cast<float*>(s.p + kStrips * padded_keys / kPairCols * 2 * kTileSize);
  s.scores = s.out + kStrips * kTileRows * 16;
  s.score_row = score_row_of(padded_keys);
  return s;
}

void query_tiles(const AttentionTile& t, int64_t d, std::byte* out) {
  for (int64_t strip = 0; strip < kStrips; ++strip)
    for (int64_t c = 0; c < d; c += kPairCols, out += 2 * kTileSize)
      for (int64_t r = 0; r < kTileRows; ++r)
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t row = strip * kTileRows + r;
          const __mmask16 there = row < t.rows ? 0xffff : 0;
          const Halves x =
              halves_of(_mm512_maskz_loadu_ps(there, t.q + row * t.q_row + c + 16 * i));
          store_row(out + 64 * r + 32 * i, x.hi);
          store_row(out + kTileSize + 64 * r + 32 * i, x.lo);
        }
}

// Adds the products of `steps` pairs of tiles, both with their halves behind each other: those of a
// in two runs, for two tiles of sums, and those of b `b_step` bytes apart. Puts the sums down.
// Tiles that nothing needs are zeroed at once: see packed_amx.h.
OMQ_INLINE void multiply_halves(const std::byte* a0, const std::byte* a1, const std::byte* b,
                                int64_t b_step, int64_t steps, float* out0, float* out1,
                                int64_t out_row_bytes) {
  memory_barrier();
  for (int64_t step = 0; step < steps;
       ++step, a0 += 2 * kTileSize, a1 += 2 * kTileSize, b += b_step) {
    _tile_loadd(4, b, kTileCols);
    _tile_loadd(5, b + kTileSize, kTileCols);
    _tile_loadd(6, a0, kTileCols);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(0, 6, 5);
    _tile_loadd(6, a0 + kTileSize, kTileCols);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(6, a1, kTileCols);
    _tile_dpbf16ps(1, 6, 4);
    _tile_dpbf16ps(1, 6, 5);
    _tile_zero(5);
    _tile_loadd(6, a1 + kTileSize, kTileCols);
    _tile_dpbf16ps(1, 6, 4);
    _tile_zero(4);
    _tile_zero(6);
  }
  _tile_stored(0, out0, out_row_bytes);
  _tile_zero(0);
  _tile_stored(1, out1, out_row_bytes);
  _tile_zero(1);
  memory_barrier();
}

// 2ˣ for x ≤ 0, relative error 2e-7.
OMQ_INLINE __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 0);
  const __m512 u = _mm512_mul_ps(_mm512_sub_ps(x, whole), _mm512_set1_ps(0.69314718f));
  constexpr float kFactors[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  __m512 p = _mm512_set1_ps(1.0f / 720);
  OMQ_UNROLL for (int i = 0; i < 6; ++i) p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(kFactors[i]));
  return _mm512_scalef_ps(p, whole);
}

// One query's scores, of which `seen` count, to exponentials in row r of the tiles p, `chunks` of
// 32 keys; gives the largest score and their sum.
OMQ_INLINE void softmax_row(const float* scores, int64_t seen, int64_t chunks, float scale,
                            std::byte* p, float* top, float* total) {
  __m512 most = _mm512_set1_ps(scores[0]);
  for (int64_t i = 0; i < seen; i += 16)
    most = _mm512_max_ps(most, _mm512_mask_loadu_ps(most, first(seen - i), scores + i));
  *top = _mm512_reduce_max_ps(most);
  const __m512 to_power = _mm512_set1_ps(scale * 1.44269504f), highest = _mm512_set1_ps(*top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t chunk = 0; chunk < chunks; ++chunk, p += 2 * kTileSize)
    OMQ_UNROLL for (int i = 0; i < 2; ++i) {
      const int64_t key = kPairCols * chunk + 16 * i;
      const __mmask16 there = key < seen ? first(seen - key) : 0;
      const __m512 s = _mm512_mask_loadu_ps(highest, there, scores + key);
      const __m512 e =
          _mm512_maskz_mov_ps(there, exp2_of(_mm512_mul_ps(_mm512_sub_ps(s, highest), to_power)));
      sum = _mm512_add_ps(sum, e);
      const Halves x = halves_of(e);
      store_row(p + 32 * i, x.hi);
      store_row(p + kTileSize + 32 * i, x.lo);
    }
  *total = _mm512_reduce_add_ps(sum);
}

}  // namespace

int64_t amx::attention_keys_bytes(int64_t keys, int64_t d) { return 2 * values_at(keys, d); }

void amx::prepare_attention_keys(const AttentionKeys& x, int64_t key0, int64_t key1,
                                 std::byte* out) {
  const int64_t key_bytes = kTileRows * x.d * 4;
  std::byte* const values = out + values_at(x.count, x.d);
  for (int64_t key = key0; key < key1; key += kPairCols) {
    for (int64_t k = key; k < key + kPairCols; k += kTileRows)
      key_tiles(x.k + k * x.k_row, x.k_row, x.count - k, x.d, out + k / kTileRows * key_bytes);
    value_tiles(x.v + key * x.v_row, x.v_row, x.count - key, x.d,
                values + key / kPairCols * 2 * key_bytes);
  }
}

int64_t amx::attention_scratch_bytes(int64_t keys, int64_t d) {
  const int64_t padded = round_up(keys, kPairCols);
  return kStrips * (d + padded) / kPairCols * 2 * kTileSize + kStrips * kTileSize +
         kAttentionQueries * score_row_of(padded) * 4;
}

void amx::attention_tile(const AttentionTile& t, const AttentionKeys& x, const std::byte* keys,
                         std::byte* memory) {
  const int64_t d = x.d, key_bytes = kTileRows * d * 4;
  const int64_t seen = round_up(t.seen + (t.rows - 1) * t.more, kPairCols);
  const int64_t chunks = seen / kPairCols, q_bytes = d / kPairCols * 2 * kTileSize;
  const Scratch s = scratch_at(memory, seen, d);
  take_tiles();
  query_tiles(t, d, s.q);
  for (int64_t key = 0; key < seen; key += kTileRows)
    multiply_halves(s.q, s.q + q_bytes, keys + key / kTileRows * key_bytes, 2 * kTileSize,
                    d / kPairCols, s.scores + key, s.scores + kTileRows * s.score_row + key,
                    4 * s.score_row);
  for (int64_t r = 0; r < kAttentionQueries; ++r) {
    std::byte* p = s.p + r / kTileRows * chunks * 2 * kTileSize + r % kTileRows * kTileCols;
    if (r < t.rows)
      softmax_row(s.scores + r * s.score_row, t.seen + r * t.more, chunks, t.scale, p, t.top + r,
                  t.total + r);
  }
  const std::byte* values = keys + values_at(x.count, d);
  const std::byte* second = s.p + chunks * 2 * kTileSize;
  for (int64_t c = 0; c < d; c += 16) {
    multiply_halves(s.p, second, values + c / 16 * 2 * kTileSize, 2 * key_bytes, chunks, s.out,
                    s.out + kTileRows * 16, kTileCols);
    for (int64_t r = 0; r < t.rows; ++r)
      _mm512_storeu_ps(t.y + r * t.y_row + c, _mm512_mul_ps(_mm512_load_ps(s.out + 16 * r),
                                                            _mm512_set1_ps(1.0f / t.total[r])));
  }
  release_tiles();
}

}  // namespace omq::cpu
