// Causal attention on tensor cores, forward: 16-bit q, k, v, F32 scores, softmax and sums. The
// backward is attention_mma_vjp.cu.
//
// A block owns 128 queries of one head, a warp 32 of them, and walks over the keys in tiles of 64.
// Scores stay in registers: a warp's S = q kᵀ becomes, rounded, the left operand of S v. The
// softmax runs along (Milakov & Gimelshein 2018; Dao et al. 2022, FlashAttention, Algorithm 1): m
// and l are a row's maximum and sum so far, earlier sums shrink when m grows. Copies overlap the
// arithmetic: V's tile arrives during q kᵀ, K's next one during the softmax and S v.
#include "cuda/attention_mma.cuh"

namespace omq::cuda {
namespace {

constexpr int kWarps = 4, kTiles = 2;  // warps a block, 16-row tiles a warp
constexpr int kQueries = kWarps * kTiles * 16, kKeys = 64;
constexpr int kThreads = kWarps * 32;

// Bytes of shared memory: Q, K, V.
template <int D> struct Layout {
  static constexpr int kK = kQueries * D * 2, kV = kK + kKeys * D * 2, kBytes = kV + kKeys * D * 2;
};

// Where a thread's numbers lie, for 16-row tile i of its warp: rows first_row + 8 r, r = 0, 1; and
// its addresses in shared memory.
struct Place {
  int warp, lane;
  uint32_t rows, cols;
  __device__ int first_row(int i) const { return (warp * kTiles + i) * 16 + (lane >> 2); }
  __device__ int first_col() const { return (lane & 3) * 2; }
};

// s = q kᵀ for the warp's rows and the tile's 64 keys.
template <class T, int D>
__device__ __forceinline__ void scores(float (&s)[kTiles][kKeys / 8][4], Place at) {
  const uint32_t q = at.rows + static_cast<uint32_t>(at.warp * kTiles * 16 * D * 2);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][n][e] = 0.0f;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load_a<D>(a[i], q, 0, i * 16, step * 2);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      load_b<D>(b, at.cols, Layout<D>::kK, n * 16, step * 2);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        multiply(T{}, s[i][2 * n], a[i], b[0], b[1]);
        multiply(T{}, s[i][2 * n + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Keys that a row may not see get −∞: key key0 + c is seen by query row r when c < limit + r.
__device__ __forceinline__ void mask(float (&s)[kTiles][kKeys / 8][4], Place at, bool causal,
                                     int causal_limit, int keys_left) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int col = n * 8 + at.first_col() + (e & 1), row = at.first_row(i) + (e >> 1) * 8;
        if (col >= keys_left || (causal && col >= causal_limit + row)) s[i][n][e] = -INFINITY;
      }
}

// Turns scores into exp(scale (s − m)), with m the new maximum, and shrinks o and l to it.
template <int D>
__device__ __forceinline__ void softmax_step(float (&s)[kTiles][kKeys / 8][4],
                                             float (&o)[kTiles][D / 8][4], float (&m)[kTiles][2],
                                             float (&l)[kTiles][2], float scale2) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = m[i][r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        top = fmaxf(top, fmaxf(s[i][n][2 * r], s[i][n][2 * r + 1]));
      top = quad_max(top);
      const float shrink = exp2_fast((m[i][r] - top) * scale2), shift = top * scale2;
      m[i][r] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[i][n][e] = exp2_fast(fmaf(s[i][n][e], scale2, -shift));
          sum += s[i][n][e];
        }
      l[i][r] = l[i][r] * shrink + sum;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        o[i][n][2 * r] *= shrink;
        o[i][n][2 * r + 1] *= shrink;
      }
    }
}

// o += p v.
template <class T, int D>
__device__ __forceinline__ void weighted_values(float (&o)[kTiles][D / 8][4],
                                                const float (&p)[kTiles][kKeys / 8][4], Place at) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) round_to_a<T>(a[i], p[i][2 * step], p[i][2 * step + 1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_b_rows_k<D>(b, at.rows, Layout<D>::kV, step * 16, n * 2);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        multiply(T{}, o[i][2 * n], a[i], b[0], b[1]);
        multiply(T{}, o[i][2 * n + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// y = o / l and lse = m + log l.
template <class T, int D>
__device__ __forceinline__ void store(const AttentionArgs& a, float (&o)[kTiles][D / 8][4],
                                      const float (&m)[kTiles][2], float (&l)[kTiles][2], int t0,
                                      int64_t y_base, float* lse, float scale2, Place at) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(l[i][r]);
      const int t = t0 + at.first_row(i) + r * 8;
      if (t >= a.queries) continue;
      const float inverse = 1.0f / total;
      if ((at.lane & 3) == 0) lse[t] = (m[i][r] * scale2 + log2f(total)) * kLn2;
      const int64_t row = y_base + t * a.y.row;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const int col = n * 8 + at.first_col();
        if (col >= a.size) continue;
        const float first = o[i][n][2 * r] * inverse, second = o[i][n][2 * r + 1] * inverse;
        if (a.y.narrow)
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(a.y.data) + row + col) =
              pack_pair(T{}, first, second);
        else
          *reinterpret_cast<float2*>(static_cast<float*>(a.y.data) + row + col) =
              make_float2(first, second);
      }
    }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) attention_kernel(const AttentionArgs a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t sq = shared_address(shared), sk = sq + Layout<D>::kK, sv = sq + Layout<D>::kV;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Place at{static_cast<int>(threadIdx.x) / 32, lane, lane_rows<D>(sq, lane),
                 lane_cols<D>(sq, lane)};
  const int b = static_cast<int>(blockIdx.x) / a.heads, h = static_cast<int>(blockIdx.x) % a.heads;
  const int kv = h / (a.heads / a.kv_heads);
  const int t0 = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kQueries;  // longest rows first
  const int offset = a.keys - a.queries;
  const int seen = a.causal ? offset + min(t0 + kQueries, a.queries) : a.keys;
  const int warp_sees = a.causal ? offset + t0 + (at.warp + 1) * kTiles * 16 : a.keys;
  const uint16_t *q = row_of(a.q, b, t0, h), *k = row_of(a.k, b, 0, kv), *v = row_of(a.v, b, 0, kv);
  const float scale2 = a.scale * kLog2e;

  load_tile<kQueries, D, kThreads>(sq, q, a.q.row, a.queries - t0, a.size);
  load_tile<kKeys, D, kThreads>(sk, k, a.k.row, a.keys, a.size);
  copy_async_commit();
  float o[kTiles][D / 8][4] = {}, l[kTiles][2] = {}, m[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) m[i][0] = m[i][1] = -INFINITY;

  for (int key = 0; key < seen; key += kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // K is here; everybody is done with the V before
    load_tile<kKeys, D, kThreads>(sv, v + key * a.v.row, a.v.row, a.keys - key, a.size);
    copy_async_commit();
    const bool active = key < warp_sees;  // the same for a whole warp
    float s[kTiles][kKeys / 8][4];
    if (active) scores<T, D>(s, at);
    copy_async_wait<0>();
    __syncthreads();  // V is here; everybody is done with this K
    if (key + kKeys < seen)
      load_tile<kKeys, D, kThreads>(sk, k + (key + kKeys) * a.k.row, a.k.row, a.keys - key - kKeys,
                                    a.size);
    copy_async_commit();
    if (!active) continue;
    const int causal_limit = offset + t0 - key + 1;
    if (key + kKeys > a.keys || (a.causal && kKeys > causal_limit))
      mask(s, at, a.causal, causal_limit, a.keys - key);
    softmax_step<D>(s, o, m, l, scale2);
    weighted_values<T, D>(o, s, at);
  }
  store<T, D>(a, o, m, l, t0, b * a.y.batch + h * a.y.head,
              a.lse + (static_cast<int64_t>(b) * a.heads + h) * a.queries, scale2, at);
}

template <class T, int D> void launch(const AttentionArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.batches * a.heads),
                  static_cast<unsigned>((a.queries + kQueries - 1) / kQueries));
  allow_shared(attention_kernel<T, D>, Layout<D>::kBytes);
  attention_kernel<T, D><<<grid, kThreads, Layout<D>::kBytes, stream>>>(a);
}

}  // namespace

void attention_mma(const AttentionArgs& a, bool bf16, cudaStream_t stream) {
  if (a.size <= 64)
    bf16 ? launch<Bf16, 64>(a, stream) : launch<F16, 64>(a, stream);
  else
    bf16 ? launch<Bf16, 128>(a, stream) : launch<F16, 128>(a, stream);
}

}  // namespace omq::cuda
