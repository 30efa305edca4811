// The few instructions that CUDA C++ has no name for, each as one function: asynchronous copies to
// shared memory, ldmatrix, the 16-bit matrix product, packed conversions, 2ˣ. All exist since
// sm_80 but those of clusters. mma.cuh builds on them.
#pragma once

#include <cstdint>

namespace omq::cuda {

struct Bf16 {};  // which 16-bit type a kernel multiplies
struct F16 {};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 (4) bytes to shared memory, or zeros when they are not present.
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async4(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(present ? 4 : 0)
               : "memory");
}
// For loads of what is read once: the L2 cache gives it up first, and keeps what kernels hand to
// each other.
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// 16 bytes, 8 or 4.
template <int kBytes>
__device__ __forceinline__ void copy_async_once(uint32_t to, const void* from, uint64_t policy) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(from), "l"(policy)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(to),
                 "l"(from), "n"(kBytes), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ uint4 load_once(const uint4* p, uint64_t policy) {
  uint4 v;
  asm("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p), "l"(policy));
  return v;
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's committed groups are still on their way.
template <int N> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Asks for bytes of device memory (p and bytes multiples of 16) in the L2 cache.
__device__ __forceinline__ void prefetch_to_l2([[maybe_unused]] const void* p,
                                               [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
               "r"(bytes));
#endif
}

// Of a cluster of blocks, from sm_90 on: a barrier of all threads of all blocks, which orders their
// shared memory; the two halves of one that does not, for a block must have begun before others
// write into its shared memory; and such a write, at a shared address as it is in the own block.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ uint32_t address_in_cluster(uint32_t address,
                                                       [[maybe_unused]] uint32_t block) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
#endif
  return address;
}
__device__ __forceinline__ void store_in_cluster([[maybe_unused]] uint32_t address,
                                                 [[maybe_unused]] uint32_t block,
                                                 [[maybe_unused]] float v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in_cluster(address, block)), "f"(v)
               : "memory");
#endif
}
__device__ __forceinline__ void store_in_cluster([[maybe_unused]] uint32_t address,
                                                 [[maybe_unused]] uint32_t block,
                                                 [[maybe_unused]] float4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address_in_cluster(address, block)),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
#endif
}

// 16 (8) bytes of shared memory where `where` says so; else the words stay as they are. The moves
// are none in the end: without them ptxas makes a branch of the predicate.
__device__ __forceinline__ void load_shared_where(uint32_t& a, uint32_t& b, uint32_t& c,
                                                  uint32_t& d, uint32_t address, bool where) {
  asm volatile(
      "{.reg .pred p;\n.reg .b32 a, b, c, d;\nsetp.ne.u32 p, %5, 0;\n"
      "mov.b32 a, %0;\nmov.b32 b, %1;\nmov.b32 c, %2;\nmov.b32 d, %3;\n"
      "@p ld.shared.v4.u32 {a, b, c, d}, [%4];\n"
      "mov.b32 %0, a;\nmov.b32 %1, b;\nmov.b32 %2, c;\nmov.b32 %3, d;}"
      : "+r"(a), "+r"(b), "+r"(c), "+r"(d)
      : "r"(address), "r"(static_cast<uint32_t>(where))
      : "memory");
}
__device__ __forceinline__ void load_shared_where(uint32_t (&v)[2], uint32_t address, bool where) {
  asm volatile(
      "{.reg .pred p;\n.reg .b32 a, b;\nsetp.ne.u32 p, %3, 0;\nmov.b32 a, %0;\nmov.b32 b, %1;\n"
      "@p ld.shared.v2.u32 {a, b}, [%2];\nmov.b32 %0, a;\nmov.b32 %1, b;}"
      : "+r"(v[0]), "+r"(v[1])
      : "r"(address), "r"(static_cast<uint32_t>(where))
      : "memory");
}

// Four 8 × 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a · b.
__device__ __forceinline__ void multiply(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(F16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a · b of bytes, a without and b with a sign: 16 × 8 × 32.
__device__ __forceinline__ void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded (half to even) to 16 bits, the first in the low half.
__device__ __forceinline__ uint32_t pack_pair(Bf16, float first, float second) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
}
__device__ __forceinline__ uint32_t pack_pair(F16, float first, float second) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
}

__device__ __forceinline__ float2 unpack_pair(Bf16, uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack_pair(F16, uint32_t pair) {
  float2 r;
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(r.x), "=f"(r.y)
      : "r"(pair));
  return r;
}

// The larger; NaN where one of them is.
__device__ __forceinline__ float larger_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// 1 / x, relative error < 2⁻²³; denormals are 0.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp2_fast(float x) {  // 2ˣ, relative error < 2⁻²²; −∞ gives 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace omq::cuda
