// What the AVX-512 and AMX kernels use of <immintrin.h>, in plain C++: with this folder in front of
// the compiler's own, they run, slowly, on every processor (omq-test-emulated of
// cmake/Tests.cmake). What a function does is Intel's Intrinsics Guide in one line; a kernel that
// needs another one does not compile until it stands here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// The kernels ask the processor before they say that they run.
#define __builtin_cpu_supports(name) true

namespace emulated {

template <class T, int N> struct Lanes { T v[N]; };
// A register: bytes that are read as lanes of any type.
template <int Bytes> struct alignas(Bytes) Register {
  unsigned char bytes[Bytes];
  template <class T> Lanes<T, Bytes / int{sizeof(T)}> as() const {
    Lanes<T, Bytes / int{sizeof(T)}> r;
    std::memcpy(&r, bytes, Bytes);
    return r;
  }
};
template <class R, class T, int N> R from(const Lanes<T, N>& lanes) {
  static_assert(sizeof(R) == sizeof lanes);
  R r;
  std::memcpy(&r, &lanes, sizeof r);
  return r;
}
template <class R> R load(const void* at) {
  R r;
  std::memcpy(&r, at, sizeof r);
  return r;
}
template <class R> void store(void* at, const R& r) { std::memcpy(at, &r, sizeof r); }

// R of lanes T: f(i) for each.
template <class R, class T, class F> R each(F&& f) {
  Lanes<T, int{sizeof(R)} / int{sizeof(T)}> r;
  for (int i = 0; i < int{sizeof(R)} / int{sizeof(T)}; ++i) r.v[i] = static_cast<T>(f(i));
  return from<R>(r);
}

// A result of its own: the compiler joins no product and sum to one operation.
inline float rounded(float x) {
  asm("" : "+x"(x));
  return x;
}
inline float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                     : exponent == 31
                         ? (mantissa ? NAN : INFINITY)
                         : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return h >> 15 ? -size : size;
}

struct Tile {
  alignas(64) unsigned char row[16][64];
};
inline thread_local Tile tiles[8];

}  // namespace emulated

struct __m128i : emulated::Register<16> {};
struct __m256i : emulated::Register<32> {};
struct __m512i : emulated::Register<64> {};
struct __m512 : emulated::Register<64> {};
using __mmask16 = uint16_t;
using __mmask64 = uint64_t;

// ---- memory ----

enum { _MM_HINT_T0 };
inline void _mm_prefetch(const void*, int) {}
inline __m128i _mm_loadu_si128(const void* p) { return emulated::load<__m128i>(p); }
inline void _mm_storeu_si128(void* p, __m128i v) { emulated::store(p, v); }
inline void _mm_store_si128(void* p, __m128i v) { emulated::store(p, v); }
inline __m256i _mm256_loadu_si256(const void* p) { return emulated::load<__m256i>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return emulated::load<__m512i>(p); }
inline __m512i _mm512_load_si512(const void* p) { return emulated::load<__m512i>(p); }
inline __m512 _mm512_load_ps(const void* p) { return emulated::load<__m512>(p); }
inline __m512 _mm512_loadu_ps(const void* p) { return emulated::load<__m512>(p); }
inline void _mm512_store_si512(void* p, __m512i v) { emulated::store(p, v); }
inline void _mm512_storeu_si512(void* p, __m512i v) { emulated::store(p, v); }
inline void _mm512_store_ps(float* p, __m512 v) { emulated::store(p, v); }
inline void _mm512_stream_ps(float* p, __m512 v) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) std::abort();  // as a processor would fault
  emulated::store(p, v);
}
inline void _mm_sfence() {}
inline void _mm256_store_si256(__m256i* p, __m256i v) { emulated::store(p, v); }
inline __m512 _mm512_mask_loadu_ps(__m512 other, __mmask16 m, const void* p) {
  return emulated::each<__m512, float>([&](int i) {
    float v = other.as<float>().v[i];
    if (m >> i & 1) std::memcpy(&v, static_cast<const uint8_t*>(p) + 4 * i, 4);
    return v;
  });
}
inline void _mm512_storeu_ps(float* p, __m512 v) { emulated::store(p, v); }
inline void _mm512_mask_storeu_ps(float* p, __mmask16 m, __m512 v) {
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) p[i] = v.as<float>().v[i];
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) {
  return emulated::each<__m512, float>([&](int i) {
    float v = 0;
    if (m >> i & 1) std::memcpy(&v, static_cast<const uint8_t*>(p) + 4 * i, 4);
    return v;
  });
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 m, const void* p) {
  const auto* b = static_cast<const uint8_t*>(p);
  return emulated::each<__m512i, uint8_t>([&](int i) { return m >> i & 1 ? b[i] : 0; });
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
  return emulated::each<__m256i, uint16_t>([&](int i) {
    uint16_t v = 0;
    if (m >> i & 1) std::memcpy(&v, static_cast<const uint8_t*>(p) + 2 * i, 2);
    return v;
  });
}

// ---- whole numbers ----

inline __m512i _mm512_setzero_si512() { return {}; }
inline __m512i _mm512_set1_epi8(char x) {
  return emulated::each<__m512i, char>([&](int) { return x; });
}
inline __m512i _mm512_set1_epi32(int x) {
  return emulated::each<__m512i, int>([&](int) { return x; });
}

#define OMQ_EMULATE(name, type, expression)                                  \
  inline __m512i name(__m512i a, __m512i b) {                                \
    const auto x = a.as<type>(), y = b.as<type>();                           \
    return emulated::each<__m512i, type>([&](int i) { return expression; }); \
  }
OMQ_EMULATE(_mm512_add_epi32, uint32_t, x.v[i] + y.v[i])
OMQ_EMULATE(_mm512_sub_epi32, uint32_t, x.v[i] - y.v[i])
OMQ_EMULATE(_mm512_mullo_epi32, uint32_t, x.v[i] * y.v[i])
OMQ_EMULATE(_mm512_sub_epi8, uint8_t, x.v[i] - y.v[i])
OMQ_EMULATE(_mm512_and_si512, uint64_t, x.v[i] & y.v[i])
OMQ_EMULATE(_mm512_or_si512, uint64_t, x.v[i] | y.v[i])
#undef OMQ_EMULATE

inline __m512i _mm512_maskz_sub_epi8(__mmask64 m, __m512i a, __m512i b) {
  const auto x = a.as<uint8_t>(), y = b.as<uint8_t>();
  return emulated::each<__m512i, uint8_t>([&](int i) { return m >> i & 1 ? x.v[i] - y.v[i] : 0; });
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const auto x = a.as<int16_t>(), y = b.as<int16_t>();
  return emulated::each<__m512i, int>(
      [&](int i) { return x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]; });
}
inline __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  return emulated::each<__m512i, uint8_t>([&](int i) {
    int r = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const auto of = [&](const __m512i& v) { return v.bytes[i] >> bit & 1; };
      r |= (table >> (of(a) << 2 | of(b) << 1 | of(c)) & 1) << bit;
    }
    return r;
  });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  return emulated::each<__m512i, uint32_t>([&](int i) { return a.as<uint32_t>().v[i] << n; });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  return emulated::each<__m512i, uint32_t>([&](int i) { return a.as<uint32_t>().v[i] >> n; });
}
inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) {
  return emulated::each<__m512i, int>([&](int i) { return a.as<int>().v[i] >> n; });
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
  return emulated::each<__m512i, uint16_t>([&](int i) { return a.as<uint16_t>().v[i] >> n; });
}
// Bytes of a without, bytes of b with a sign.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto s = sum.as<int>();
  const auto x = a.as<uint8_t>();
  const auto y = b.as<int8_t>();
  return emulated::each<__m512i, int>([&](int i) {
    int r = s.v[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) r += x.v[j] * y.v[j];
    return r;
  });
}
inline int _mm512_reduce_add_epi32(__m512i a) {
  uint32_t sum = 0;
  for (const uint32_t x : a.as<uint32_t>().v) sum += x;
  return static_cast<int>(sum);
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
  return emulated::each<__m512i, int>([&](int i) { return a.bytes[i]; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return emulated::each<__m512i, int>([&](int i) { return a.as<uint16_t>().v[i]; });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  return emulated::each<__m128i, int8_t>([&](int i) { return a.as<int>().v[i]; });
}

// ---- floating point ----

inline __m512 _mm512_setzero_ps() { return {}; }
inline __m512 _mm512_set1_ps(float x) {
  return emulated::each<__m512, float>([&](int) { return x; });
}
inline __m512 _mm512_castsi512_ps(__m512i a) { return emulated::load<__m512>(&a); }

#define OMQ_EMULATE(name, expression)                                        \
  inline __m512 name(__m512 a, __m512 b) {                                   \
    const auto x = a.as<float>(), y = b.as<float>();                         \
    return emulated::each<__m512, float>([&](int i) { return expression; }); \
  }
OMQ_EMULATE(_mm512_add_ps, emulated::rounded(x.v[i] + y.v[i]))
OMQ_EMULATE(_mm512_sub_ps, emulated::rounded(x.v[i] - y.v[i]))
OMQ_EMULATE(_mm512_mul_ps, emulated::rounded(x.v[i] * y.v[i]))
OMQ_EMULATE(_mm512_max_ps, x.v[i] > y.v[i] ? x.v[i] : y.v[i])
#undef OMQ_EMULATE

inline __m512 _mm512_abs_ps(__m512 a) {
  return emulated::each<__m512, float>([&](int i) { return std::fabs(a.as<float>().v[i]); });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = a.as<float>(), y = b.as<float>(), z = c.as<float>();
  return emulated::each<__m512, float>([&](int i) { return std::fma(x.v[i], y.v[i], z.v[i]); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return emulated::each<__m512, float>([&](int i) { return a.as<int>().v[i]; });
}
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return emulated::each<__m512i, int>([&](int i) { return std::nearbyint(a.as<float>().v[i]); });
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  return emulated::each<__m512, float>(
      [&](int i) { return emulated::from_half(a.as<uint16_t>().v[i]); });
}
enum { _CMP_NLE_UQ };  // the one comparison that is asked for
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {
  int m = 0;
  for (int i = 0; i < 16; ++i) m |= int{!(a.as<float>().v[i] <= b.as<float>().v[i])} << i;
  return static_cast<__mmask16>(m);
}
// Halves are added to halves.
inline float _mm512_reduce_add_ps(__m512 a) {
  auto x = a.as<float>();
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x.v[i] += x.v[i + n];
  return x.v[0];
}
inline float _mm512_reduce_max_ps(__m512 a) {
  float most = -INFINITY;
  for (const float x : a.as<float>().v) most = x > most ? x : most;
  return most;
}

inline __m512i _mm512_castps_si512(__m512 a) { return emulated::load<__m512i>(&a); }
inline __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 a) {
  return emulated::each<__m512, float>([&](int i) { return m >> i & 1 ? a.as<float>().v[i] : 0; });
}
inline __m512 _mm512_roundscale_ps(__m512 a, int) {
  return emulated::each<__m512, float>([&](int i) { return std::nearbyint(a.as<float>().v[i]); });
}
inline __m512 _mm512_scalef_ps(__m512 a, __m512 by) {
  return emulated::each<__m512, float>([&](int i) {
    return std::ldexp(a.as<float>().v[i], static_cast<int>(std::floor(by.as<float>().v[i])));
  });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return emulated::each<__m256i, uint16_t>(
      [&](int i) { return static_cast<uint16_t>(a.as<uint32_t>().v[i]); });
}

// ---- tiles: 16 rows of 64 bytes, all of them ----

inline void _tile_loadconfig(const void*) {}
inline void _tile_release() {}
inline void _tile_zero(int t) { emulated::tiles[t] = {}; }
inline void _tile_loadd(int t, const void* from, long stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(emulated::tiles[t].row[r], static_cast<const char*>(from) + r * stride, 64);
}
inline void _tile_stored(int t, void* to, long stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, emulated::tiles[t].row[r], 64);
}
// Signed bytes of a, row by row, with those of b, whose rows hold four of each column's.
inline void _tile_dpbssd(int sum, int a, int b) {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) {
      int32_t s;
      std::memcpy(&s, emulated::tiles[sum].row[r] + 4 * c, 4);
      for (int k = 0; k < 64; ++k)
        s += static_cast<int8_t>(emulated::tiles[a].row[r][k]) *
             static_cast<int8_t>(emulated::tiles[b].row[k / 4][4 * c + k % 4]);
      std::memcpy(emulated::tiles[sum].row[r] + 4 * c, &s, 4);
    }
}
// bf16 of a, row by row, with those of b, whose rows hold two of each column's.
inline void _tile_dpbf16ps(int sum, int a, int b) {
  const auto number = [](const unsigned char* at) {
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<unsigned char*>(&bits) + 2, at, 2);
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  };
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) {
      float s;
      std::memcpy(&s, emulated::tiles[sum].row[r] + 4 * c, 4);
      for (int k = 0; k < 32; ++k)
        s += number(emulated::tiles[a].row[r] + 2 * k) *
             number(emulated::tiles[b].row[k / 2] + 4 * c + 2 * (k % 2));
      std::memcpy(emulated::tiles[sum].row[r] + 4 * c, &s, 4);
    }
}
