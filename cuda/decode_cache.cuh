// The tokens of one head in a key or value cache, as attention of a new token reads and writes
// them.
#pragma once

#include "cuda/common.cuh"
#include "tensor/row_quant.h"

namespace omq::cuda {

// A cache's floats or codes [rows, capacity, K, …]; of codes, scale and zero of each token's head.
struct CacheArgs {
  void* data;
  float2* grid;
};
__device__ __forceinline__ CacheArgs select(bool first, const CacheArgs& a, const CacheArgs& b) {
  return {first ? a.data : b.data, first ? a.grid : b.grid};  // in registers
}

template <int kBytes> struct WordOf;
template <> struct WordOf<1> { using type = uint8_t; };
template <> struct WordOf<2> { using type = uint16_t; };
template <> struct WordOf<4> { using type = uint32_t; };
template <> struct WordOf<8> { using type = uint64_t; };

// How a cache stores elements: T is __half, or codes, kPerByte to a byte.
template <int kPerByte> struct Codes {};

// A lane's kEach neighbouring elements of the tokens of one head: of `cache_row`, the head of the
// sequence's first token, and every K-th behind it.
template <class T, int kEach> class CachedHead;

template <int kEach> class CachedHead<__half, kEach> {
 public:
  // Pairs, so that a register holds two halves also where it comes from either of two places.
  static_assert(kEach % 2 == 0);
  struct alignas(2 * kEach) Raw {
    __half2 pairs[kEach / 2];
  };
  __device__ __forceinline__ CachedHead(const CacheArgs& c, int64_t cache_row, int K, int d,
                                        int element)
      : at_(static_cast<const __half*>(c.data) + cache_row * d + element), step_(K * d) {}
  __device__ __forceinline__ Raw fetch(int token) const {
    return *reinterpret_cast<const Raw*>(at_ + static_cast<int64_t>(token) * step_);
  }
  // Element j is value(r, j) · scale(r).
  __device__ static __forceinline__ float value(const Raw& r, int j) {
    return j % 2 == 0 ? __low2float(r.pairs[j / 2]) : __high2float(r.pairs[j / 2]);
  }
  __device__ static __forceinline__ float scale(const Raw&) { return 1; }
  // By one warp: a token's head as it came from prepare_head().
  __device__ static __forceinline__ void write(const CacheArgs& c, int64_t cache_row, int d,
                                               const float* x, RowGrid<float>, RowQuant, int lane) {
#pragma unroll 1
    for (int i = lane; i < d; i += 32)
      static_cast<__half*>(c.data)[cache_row * d + i] = __float2half(x[i]);
  }

 private:
  const __half* at_;
  int step_;
};

template <int kPerByte, int kEach> class CachedHead<Codes<kPerByte>, kEach> {
 public:
  using Bytes = typename WordOf<kEach / kPerByte>::type;
  struct Raw {
    Bytes codes;
    float2 grid;
  };
  __device__ __forceinline__ CachedHead(const CacheArgs& c, int64_t cache_row, int K, int d,
                                        int element)
      : at_(static_cast<const uint8_t*>(c.data) + (cache_row * d + element) / kPerByte),
        grid_(c.grid + cache_row),
        K_(K),
        step_(K * d / kPerByte) {}
  __device__ __forceinline__ Raw fetch(int token) const {
    Raw r;
    r.codes = *reinterpret_cast<const Bytes*>(at_ + static_cast<int64_t>(token) * step_);
    r.grid = grid_[static_cast<int64_t>(token) * K_];
    return r;
  }
  // A code in the low bits of 2²³ is a float that needs no conversion; zero points are whole.
  __device__ static __forceinline__ float value(const Raw& r, int j) {
    constexpr uint32_t kWhole = 0x4b000000u;
    const int byte = j / kPerByte;
    auto word = static_cast<uint32_t>(r.codes >> (byte / 4 * 32));
    if constexpr (kPerByte == 2) word = word >> (j % 2 * 4) & 0x0f0f0f0fu;
    const uint32_t code = __byte_perm(word, kWhole, 0x7540u | static_cast<uint32_t>(byte % 4));
    return __int_as_float(static_cast<int>(code)) - (__int_as_float(kWhole) + r.grid.y);
  }
  __device__ static __forceinline__ float scale(const Raw& r) { return r.grid.x; }
  __device__ static __forceinline__ void write(const CacheArgs& c, int64_t cache_row, int d,
                                               const float* x, RowGrid<float> g, RowQuant s,
                                               int lane) {
    const float top = static_cast<float>((1 << s.bits) - 1);
    bool finite = true;
#pragma unroll 1
    for (int i = lane; i < d; i += 32) finite &= isfinite(x[i]);
    finite = __all_sync(0xffffffffu, finite);
    // x is (code − zero) · scale by now, and is on the grid at that code.
    const auto code = [&](int i) {
      return finite ? static_cast<uint32_t>(row_code(x[i], g, top)) : 0u;
    };
    auto* to = static_cast<uint8_t*>(c.data) + cache_row * d / kPerByte;
#pragma unroll 1
    for (int i = lane; i < d / kPerByte; i += 32)
      to[i] = static_cast<uint8_t>(kPerByte == 1 ? code(i) : code(2 * i) | code(2 * i + 1) << 4);
    if (lane == 0)
      c.grid[cache_row] =
          finite ? make_float2(g.scale, g.zero) : make_float2(__int_as_float(0x7fc00000), 0.0f);
  }

 private:
  const uint8_t* at_;
  const float2* grid_;
  int K_, step_;
};

}  // namespace omq::cuda
