// What every .cu file builds on: launches, typed loads and stores of 8 elements, reductions inside
// a warp or a block.
//
// Kernels compute in F32 and take operands stored as F32, BF16 or F16. The type travels with the
// pointer at run time (Operand): all threads take the same branch, which is free next to a memory
// access, and one compiled kernel serves every combination of types.
//
// Rules that keep results reproducible: every sum has an order that depends on shapes alone; no
// floating-point atomics; index arithmetic in 64 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "cuda/stream.h"
#include "tensor/kernels.h"
#include "tensor/numeric.h"

namespace omq::cuda {

template <int N> using Int = std::integral_constant<int, N>;

// ---- launches ----

// Blocks in x are limited to 2³¹ − 1; kernels that may need more walk in strides of the grid.
inline unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(std::min<int64_t>(blocks, int64_t{1} << 30));
}

// Runs kernel<<<grid, threads, shared>>>(args…) on where's stream; an empty grid does nothing.
// `op` names the kernel in errors.
template <class... Params, class... Args>
void launch(const char* op, const Tensor& where, void (*kernel)(Params...), dim3 grid, int threads,
            size_t shared, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const cudaStream_t stream = stream_of(where);
  begin_launch(stream);
  kernel<<<grid, static_cast<unsigned>(threads), shared, stream>>>(static_cast<Params>(args)...);
  check_launch(op, stream);
}

// First index and stride of a loop over all threads of a one-dimensional grid.
__device__ inline int64_t grid_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t grid_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// a / b for 0 ≤ a, 0 < b: the 32-bit division where both fit, which costs a fraction.
__device__ inline int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Division by one divisor, many times: IEEE's quotient, as a / b gives it, from the rounded
// reciprocal and two corrections. For divisors and quotients well inside the range of floats.
struct Divisor {
  float value, inverse;
  __device__ explicit Divisor(float v) : value(v), inverse(1.0f / v) {}
  __device__ float under(float a) const {
    float q = a * inverse;
    q = fmaf(fmaf(-q, value, a), inverse, q);
    return fmaf(fmaf(-q, value, a), inverse, q);
  }
};

// ---- operands ----

struct Operand {  // read or written, element type known at run time; null: absent
  void* data = nullptr;
  DType dtype = DType::F32;
};

// Throws Error unless x is F32, BF16 or F16; an undefined tensor gives a null operand.
inline Operand operand(const char* op, const Tensor& x) {
  if (!x.defined()) return {};
  check(x.dtype() == DType::F32 || x.dtype() == DType::BF16 || x.dtype() == DType::F16,
        "{}: computes on F32, BF16 and F16 on a GPU, got {}", op, dtype_name(x.dtype()));
  return {x.raw(), x.dtype()};
}
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ inline float load(Operand x, int64_t i) {
  if (x.dtype == DType::F32) return static_cast<const float*>(x.data)[i];
  if (x.dtype == DType::BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(x.data)[i]);
  return __half2float(static_cast<const __half*>(x.data)[i]);
}
__device__ inline void store(Operand y, int64_t i, float v) {
  if (y.dtype == DType::F32)
    static_cast<float*>(y.data)[i] = v;
  else if (y.dtype == DType::BF16)
    static_cast<__nv_bfloat16*>(y.data)[i] = __float2bfloat16_rn(v);
  else
    static_cast<__half*>(y.data)[i] = __float2half_rn(v);
}

// Eight neighbouring elements. Loading and unpacking are separate steps, so that the loads of
// several operands are under way before the first is waited for.
constexpr int kPack = 8;
struct Raw {
  uint4 lo, hi;  // 16-bit types fill lo alone
};
template <int W> struct Piece { float v[W]; };
using Pack = Piece<kPack>;

// Elements [8i, 8i + 8); x.data is 16-byte aligned.
__device__ inline Raw load_raw(Operand x, int64_t i) {
  Raw r;
  const uint4* p = static_cast<const uint4*>(x.data);
  if (x.dtype == DType::F32) {
    r.lo = p[2 * i];
    r.hi = p[2 * i + 1];
  } else {
    r.lo = p[i];
    r.hi = uint4{};
  }
  return r;
}

__device__ inline Pack unpack(const Raw& r, DType dtype) {
  Pack out;
  if (dtype == DType::F32) {
    const uint32_t bits[kPack] = {r.lo.x, r.lo.y, r.lo.z, r.lo.w, r.hi.x, r.hi.y, r.hi.z, r.hi.w};
#pragma unroll
    for (int j = 0; j < kPack; ++j) out.v[j] = __uint_as_float(bits[j]);
    return out;
  }
  const uint32_t bits[kPack / 2] = {r.lo.x, r.lo.y, r.lo.z, r.lo.w};
#pragma unroll
  for (int j = 0; j < kPack / 2; ++j) {
    if (dtype == DType::BF16) {
      out.v[2 * j] = __uint_as_float(bits[j] << 16);
      out.v[2 * j + 1] = __uint_as_float(bits[j] & 0xffff0000u);
    } else {
      out.v[2 * j] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits[j])));
      out.v[2 * j + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits[j] >> 16)));
    }
  }
  return out;
}
__device__ inline Pack load_pack(Operand x, int64_t i) { return unpack(load_raw(x, i), x.dtype); }

__device__ inline uint32_t two_16bit(float a, float b, DType dtype) {
  if (dtype == DType::BF16)
    return __bfloat16_as_ushort(__float2bfloat16_rn(a)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
  return __half_as_ushort(__float2half_rn(a)) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(b))) << 16;
}

// Writes elements [8i, 8i + 8); y.data is 16-byte aligned.
__device__ inline void store_pack(Operand y, int64_t i, const Pack& v) {
  if (y.dtype == DType::F32) {
    float4* p = static_cast<float4*>(y.data);
    p[2 * i] = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
    p[2 * i + 1] = make_float4(v.v[4], v.v[5], v.v[6], v.v[7]);
  } else {
    static_cast<uint4*>(y.data)[i] =
        make_uint4(two_16bit(v.v[0], v.v[1], y.dtype), two_16bit(v.v[2], v.v[3], y.dtype),
                   two_16bit(v.v[4], v.v[5], y.dtype), two_16bit(v.v[6], v.v[7], y.dtype));
  }
}

// The same with a compile-time width: W = 8, or 1 where sizes or addresses do not allow packs. i
// counts pieces.
template <int W> __device__ auto fetch(Operand x, int64_t i) {
  static_assert(W == kPack || W == 1);
  if constexpr (W == 1)
    return load(x, i);
  else
    return load_raw(x, i);
}
template <int W, class R> __device__ Piece<W> expand(const R& raw, Operand x) {
  if constexpr (W == 1)
    return {{raw}};
  else
    return unpack(raw, x.dtype);
}
template <int W> __device__ Piece<W> load_piece(Operand x, int64_t i) {
  return expand<W>(fetch<W>(x, i), x);
}
template <int W> __device__ void store_piece(Operand y, int64_t i, const Piece<W>& p) {
  if constexpr (W == 1)
    store(y, i, p.v[0]);
  else
    store_pack(y, i, p);
}

// Whether runs of n elements, all starting on multiples of n, can be walked in packs.
template <class... O> bool in_packs(int64_t n, const O&... operands) {
  return n % kPack == 0 && (... && aligned16(operands.data));
}

// ---- reductions ----

struct Plus {
  template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Larger {
  template <class T> __device__ T operator()(T a, T b) const { return b > a ? b : a; }
};

// Folds the values of a team of kTeam neighbouring threads: 8, 16 or 32 lanes of a warp, or a whole
// block (kTeam > 32, equal to blockDim.x). Every thread gets the result. The order is fixed. All
// threads of the warp (or block) must take part.
template <int kTeam, class T, class F> __device__ T team_fold(T v, F fold) {
  constexpr int kLanes = kTeam < 32 ? kTeam : 32;
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) v = fold(v, __shfl_xor_sync(0xffffffffu, v, d, 32));
  if constexpr (kTeam > 32) {
    constexpr int kWarps = kTeam / 32;
    __shared__ T parts[kWarps];
    __syncthreads();  // the last call's parts have been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = parts[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) v = fold(v, parts[i]);
  }
  return v;
}
template <int kTeam, class T> __device__ T team_sum(T v) { return team_fold<kTeam>(v, Plus{}); }
template <int kTeam, class T> __device__ T team_max(T v) { return team_fold<kTeam>(v, Larger{}); }

// Rows (or groups of a row) one team each: calls body(row, lane, valid). A block's threads stay
// together, so that body may fold; where valid is false there is no row to touch.
constexpr int kRowThreads = 256;
template <int kTeam, class F> __device__ void for_each_team(int64_t rows, F&& body) {
  constexpr int kTeams = kRowThreads / kTeam;
  const int lane = static_cast<int>(threadIdx.x) % kTeam,
            team = static_cast<int>(threadIdx.x) / kTeam;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kTeams; base < rows;
       base += static_cast<int64_t>(gridDim.x) * kTeams)
    body(base + team, lane, base + team < rows);
}

// Host side: calls body(Int<W>): packs, or single elements.
template <class F> void with_width(bool packs, F&& body) {
  if (packs)
    body(Int<kPack>{});
  else
    body(Int<1>{});
}

// Host side: calls body(Int<kTeam>, Int<W>) with the team and the width for rows of n elements.
template <class F> void with_team(int64_t n, bool packs, F&& body) {
  const auto of_team = [&](auto team) {
    if (packs)
      body(team, Int<kPack>{});
    else
      body(team, Int<1>{});
  };
  if (n <= 256)
    of_team(Int<8>{});
  else if (n <= 2048)
    of_team(Int<32>{});
  else
    of_team(Int<kRowThreads>{});
}
template <int kTeam> unsigned team_blocks(int64_t rows) {
  return blocks_for(rows, kRowThreads / kTeam);
}

inline int64_t rows_of(const Tensor& x) {
  return x.numel() == 0 ? 0 : x.numel() / x.shape().back();
}

}  // namespace omq::cuda
