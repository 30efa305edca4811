// Causal attention on tensor cores, backward: P is rebuilt from lse, tile by tile.
//
//   delta_t = Σ dy_t ⊙ y_t      dS = P ⊙ (dy vᵀ − delta)
//   dv = Pᵀ dy                  dk = scale · dSᵀ q            dq = scale · dS k
//
// Two passes, so that every sum has one owner and one order (no atomic additions): one whose
// blocks own 64 keys and walk over the queries (dk, dv), one whose blocks own 128 queries and walk
// over the keys (dq); S and dy vᵀ are computed in both. The first works on transposed tiles (rows
// are keys): then Pᵀ and dSᵀ come out of one product in the registers in which the next wants them.
#include "cuda/attention_mma.cuh"

namespace omq::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;

// ---- delta, and dy in 16 bits: a warp per row ----

template <class T> __device__ __forceinline__ float2 load_pair(const HeadRows& x, int64_t at) {
  if (x.narrow)
    return unpack_pair(
        T{}, *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(x.data) + at));
  return *reinterpret_cast<const float2*>(static_cast<const float*>(x.data) + at);
}
template <class T>
__device__ __forceinline__ void store_pair(const HeadRows& x, int64_t at, float first,
                                           float second) {
  if (x.narrow)
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(x.data) + at) =
        pack_pair(T{}, first, second);
  else
    *reinterpret_cast<float2*>(static_cast<float*>(x.data) + at) = make_float2(first, second);
}

template <class T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const AttentionArgs a, uint16_t* dy16) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;  // [B, T, H]
  if (row >= static_cast<int64_t>(a.batches) * a.queries * a.heads) return;
  const int h = static_cast<int>(row % a.heads), t = static_cast<int>(row / a.heads % a.queries);
  const int b = static_cast<int>(row / a.heads / a.queries);
  const int64_t dy_at = b * a.dy.batch + t * a.dy.row + h * a.dy.head;
  const int64_t y_at = b * a.y.batch + t * a.y.row + h * a.y.head;
  float sum = 0.0f;
  for (int col = lane * 2; col < a.size; col += 64) {
    const float2 g = load_pair<T>(a.dy, dy_at + col), y = load_pair<T>(a.y, y_at + col);
    sum += g.x * y.x + g.y * y.y;
    if (!a.dy.narrow)
      *reinterpret_cast<uint32_t*>(dy16 + row * a.size + col) = pack_pair(T{}, g.x, g.y);
  }
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  if (lane == 0) a.delta[(static_cast<int64_t>(b) * a.heads + h) * a.queries + t] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(HeadRows out, const float* in, int64_t pairs, int parts, int size) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 2;
  if (i >= pairs * 2) return;
  const float* from = in + i / size * parts * size + i % size;
  float first = 0.0f, second = 0.0f;
  for (int p = 0; p < parts; ++p) {
    first += from[static_cast<int64_t>(p) * size];
    second += from[static_cast<int64_t>(p) * size + 1];
  }
  store_pair<T>(out, i, first, second);
}

template <int N> __device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
}

// This lane's two addresses (mma.cuh); rows_warp is that of its warp's first row in a tile.
struct Lanes {
  uint32_t rows, cols, rows_warp;
};

// c [16, 8 N] = the warp's 16 rows of tile `left`, times the rows of tile `right` transposed.
template <class T, int D, int N>
__device__ __forceinline__ void rows_times_rows(float (&c)[N][4], Lanes at, uint32_t left,
                                                uint32_t right) {
  clear(c);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t x[4];
    load_a<D>(x, at.rows_warp, left, 0, step * 2);
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      uint32_t y[4];
      load_b<D>(y, at.cols, right, n * 16, step * 2);
      multiply(T{}, c[2 * n], x, y[0], y[1]);
      multiply(T{}, c[2 * n + 1], x, y[2], y[3]);
    }
  }
}

// ---- dk, dv ----

namespace by_keys {

constexpr int kKeys = kWarps * 16, kQueries = 64;

// Bytes of shared memory: K, V; two stages of Q, dy; two of lse [64], delta [64].
template <int D> struct Layout {
  static constexpr uint32_t kV = kKeys * D * 2, kQ = 2 * kV, kDy = kQueries * D * 2,
                            kStage = 2 * kDy, kStats = kQ + 2 * kStage,
                            kStatsStage = 2 * kQueries * 4, kBytes = kStats + 2 * kStatsStage;
};

template <int D>
__device__ __forceinline__ void load_queries(const AttentionArgs& a, uint32_t shared, int stage,
                                             int b, int h, int t0) {
  using L = Layout<D>;
  const uint32_t to = shared + L::kQ + stage * L::kStage;
  load_tile<kQueries, D, kThreads>(to, row_of(a.q, b, t0, h), a.q.row, a.queries - t0, a.size);
  load_tile<kQueries, D, kThreads>(to + L::kDy, row_of(a.dy, b, t0, h), a.dy.row, a.queries - t0,
                                   a.size);
  const int64_t stats = (static_cast<int64_t>(b) * a.heads + h) * a.queries;
  const int i = static_cast<int>(threadIdx.x) % kQueries, t = min(t0 + i, a.queries - 1);
  const float* from = threadIdx.x < kQueries ? a.lse : a.delta;
  copy_async4(shared + L::kStats + stage * L::kStatsStage + threadIdx.x * 4, from + stats + t,
              t0 + i < a.queries);
}

// x ∂ += Pᵀ (or dSᵀ) · rows of a stage's tile.
template <class T, int D>
__device__ __forceinline__ void accumulate(float (&sum)[D / 8][4], const uint32_t (&p)[4][4],
                                           Lanes at, uint32_t tile) {
#pragma unroll
  for (int step = 0; step < kQueries / 16; ++step)
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_b_rows_k<D>(b, at.rows, tile, step * 16, n * 2);
      multiply(T{}, sum[2 * n], p[step], b[0], b[1]);
      multiply(T{}, sum[2 * n + 1], p[step], b[2], b[3]);
    }
}

// One tile of queries against this warp's 16 keys. first_seen: key row r sees query column c when
// c ≥ first_seen + r.
template <class T, int D>
__device__ __forceinline__ void step(float (&dk)[D / 8][4], float (&dv)[D / 8][4], Lanes at,
                                     uint32_t stage, const float* stats, float scale2, bool masked,
                                     int first_seen, int warp, int lane) {
  using L = Layout<D>;
  float p[kQueries / 8][4], ds[kQueries / 8][4];
  rows_times_rows<T, D>(p, at, 0, stage);  // Sᵀ
  const int col0 = (lane & 3) * 2, row0 = warp * 16 + (lane >> 2);
#pragma unroll
  for (int n = 0; n < kQueries / 8; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(stats + n * 8 + col0);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      p[n][e] = exp2_fast(fmaf(p[n][e], scale2, -((e & 1) ? lse.y : lse.x) * kLog2e));
    if (masked) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (n * 8 + col0 + (e & 1) < first_seen + row0 + (e >> 1) * 8) p[n][e] = 0.0f;
    }
  }
  uint32_t left[kQueries / 16][4];
#pragma unroll
  for (int i = 0; i < kQueries / 16; ++i) round_to_a<T>(left[i], p[2 * i], p[2 * i + 1]);
  accumulate<T, D>(dv, left, at, stage + L::kDy);
  rows_times_rows<T, D>(ds, at, L::kV, stage + L::kDy);  // (dy vᵀ)ᵀ
#pragma unroll
  for (int n = 0; n < kQueries / 8; ++n) {
    const float2 delta = *reinterpret_cast<const float2*>(stats + kQueries + n * 8 + col0);
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[n][e] = p[n][e] * (ds[n][e] - ((e & 1) ? delta.y : delta.x));
  }
#pragma unroll
  for (int i = 0; i < kQueries / 16; ++i) round_to_a<T>(left[i], ds[2 * i], ds[2 * i + 1]);
  accumulate<T, D>(dk, left, at, stage);
}

template <class T, int D>
__device__ __forceinline__ void store(const HeadRows& x, const float (&sum)[D / 8][4], float factor,
                                      int b, int head, int first, int rows, int size, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + (lane >> 2) + r * 8;
    if (row >= rows) continue;
    const int64_t at = b * x.batch + row * x.row + head * x.head;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int col = n * 8 + (lane & 3) * 2;
      if (col < size)
        store_pair<T>(x, at + col, sum[n][2 * r] * factor, sum[n][2 * r + 1] * factor);
    }
  }
}

// blockIdx.x: (batch, key/value head, part), blockIdx.y: tile of keys. The tile's queries, of all
// heads of this part, are walked in one row of steps.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) kernel(const AttentionArgs a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  using L = Layout<D>;
  const uint32_t base = shared_address(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t rows = lane_rows<D>(base, lane);
  const Lanes at{rows, lane_cols<D>(base, lane), rows + static_cast<uint32_t>(warp * 16 * D * 2)};
  const int head = static_cast<int>(blockIdx.x) % (a.kv_heads * a.parts);  // of dk, dv
  const int b = static_cast<int>(blockIdx.x) / (a.kv_heads * a.parts), kv = head / a.parts;
  const int heads = a.heads / a.kv_heads / a.parts, h0 = head * heads;
  const int s0 = static_cast<int>(blockIdx.y) * kKeys, offset = a.keys - a.queries;
  const int first = a.causal ? max(0, s0 - offset) / kQueries : 0;
  const int tiles = (a.queries + kQueries - 1) / kQueries - first, total = heads * tiles;
  const float scale2 = a.scale * kLog2e;

  load_tile<kKeys, D, kThreads>(base, row_of(a.k, b, s0, kv), a.k.row, a.keys - s0, a.size);
  load_tile<kKeys, D, kThreads>(base + L::kV, row_of(a.v, b, s0, kv), a.v.row, a.keys - s0, a.size);
  load_queries<D>(a, base, 0, b, h0, first * kQueries);
  copy_async_commit();
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  for (int i = 0; i < total; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // step i's tiles are here; everybody is done with those of step i − 1
    if (i + 1 < total)
      load_queries<D>(a, base, (i + 1) & 1, b, h0 + (i + 1) / tiles,
                      (first + (i + 1) % tiles) * kQueries);
    copy_async_commit();
    const int t0 = (first + i % tiles) * kQueries;
    const float* stats =
        reinterpret_cast<const float*>(shared + L::kStats + (i & 1) * L::kStatsStage);
    step<T, D>(dk, dv, at, L::kQ + (i & 1) * L::kStage, stats, scale2,
               a.causal && s0 + kKeys - 1 > offset + t0, s0 - offset - t0, warp, lane);
  }
  store<T, D>(a.dk, dk, a.scale, b, head, s0 + warp * 16, a.keys, a.size, lane);
  store<T, D>(a.dv, dv, 1.0f, b, head, s0 + warp * 16, a.keys, a.size, lane);
}

}  // namespace by_keys

// ---- dq ----

namespace by_queries {

constexpr int kTiles = 2, kQueries = kWarps * kTiles * 16, kKeys = 32;

// Bytes of shared memory: Q, dy; two stages of K, V.
template <int D> struct Layout {
  static constexpr uint32_t kDy = kQueries * D * 2, kK = 2 * kDy, kV = kKeys * D * 2,
                            kStage = 2 * kV, kBytes = kK + 2 * kStage;
};

// c [i][16, 32] = rows of `left` times the rows of `right` transposed, for both of a warp's tiles.
template <class T, int D>
__device__ __forceinline__ void products(float (&c)[kTiles][kKeys / 8][4], Lanes at, uint32_t left,
                                         uint32_t right) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) clear(c[i]);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t x[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load_a<D>(x[i], at.rows_warp, left, i * 16, step * 2);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t y[4];
      load_b<D>(y, at.cols, right, n * 16, step * 2);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        multiply(T{}, c[i][2 * n], x[i], y[0], y[1]);
        multiply(T{}, c[i][2 * n + 1], x[i], y[2], y[3]);
      }
    }
  }
}

template <int D>
__device__ __forceinline__ void load_keys(const AttentionArgs& a, uint32_t to, int b, int kv,
                                          int s0) {
  load_tile<kKeys, D, kThreads>(to, row_of(a.k, b, s0, kv), a.k.row, a.keys - s0, a.size);
  load_tile<kKeys, D, kThreads>(to + kKeys * D * 2, row_of(a.v, b, s0, kv), a.v.row, a.keys - s0,
                                a.size);
}

// One tile of keys. limit: query row r sees key column c when c < limit + r; keys_left exist.
template <class T, int D>
__device__ __forceinline__ void step(float (&dq)[kTiles][D / 8][4], Lanes at, uint32_t keys,
                                     const float (&lse)[kTiles][2], const float (&delta)[kTiles][2],
                                     float scale2, bool masked, int limit, int keys_left, int warp,
                                     int lane) {
  float p[kTiles][kKeys / 8][4], ds[kTiles][kKeys / 8][4];
  products<T, D>(p, at, 0, keys);
  products<T, D>(ds, at, Layout<D>::kDy, keys + Layout<D>::kV);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = (warp * kTiles + i) * 16 + (lane >> 2) + (e >> 1) * 8;
        const int col = n * 8 + (lane & 3) * 2 + (e & 1);
        const float weight = exp2_fast(fmaf(p[i][n][e], scale2, -lse[i][e >> 1]));
        const bool hidden = masked && (col >= limit + row || col >= keys_left);
        ds[i][n][e] = hidden ? 0.0f : weight * (ds[i][n][e] - delta[i][e >> 1]);
      }
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) round_to_a<T>(left[i], ds[i][2 * k], ds[i][2 * k + 1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_b_rows_k<D>(b, at.rows, keys, k * 16, n * 2);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        multiply(T{}, dq[i][2 * n], left[i], b[0], b[1]);
        multiply(T{}, dq[i][2 * n + 1], left[i], b[2], b[3]);
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) kernel(const AttentionArgs a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  using L = Layout<D>;
  const uint32_t base = shared_address(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t rows = lane_rows<D>(base, lane);
  const Lanes at{rows, lane_cols<D>(base, lane),
                 rows + static_cast<uint32_t>(warp * kTiles * 16 * D * 2)};
  const int b = static_cast<int>(blockIdx.x) / a.heads, h = static_cast<int>(blockIdx.x) % a.heads;
  const int kv = h / (a.heads / a.kv_heads);
  const int t0 = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kQueries;
  const int offset = a.keys - a.queries;
  const int seen = a.causal ? offset + min(t0 + kQueries, a.queries) : a.keys;
  const int warp_sees = a.causal ? offset + t0 + (warp + 1) * kTiles * 16 : a.keys;

  load_tile<kQueries, D, kThreads>(base, row_of(a.q, b, t0, h), a.q.row, a.queries - t0, a.size);
  load_tile<kQueries, D, kThreads>(base + L::kDy, row_of(a.dy, b, t0, h), a.dy.row, a.queries - t0,
                                   a.size);
  load_keys<D>(a, base + L::kK, b, kv, 0);
  copy_async_commit();
  float dq[kTiles][D / 8][4] = {}, lse[kTiles][2], delta[kTiles][2];
  const int64_t stats = (static_cast<int64_t>(b) * a.heads + h) * a.queries;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = t0 + (warp * kTiles + i) * 16 + (lane >> 2) + r * 8;
      lse[i][r] = t < a.queries ? a.lse[stats + t] * kLog2e : 0.0f;
      delta[i][r] = t < a.queries ? a.delta[stats + t] : 0.0f;
    }
  for (int key = 0, stage = 0; key < seen; key += kKeys, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is here; everybody is done with the one before
    if (key + kKeys < seen)
      load_keys<D>(a, base + L::kK + (stage ^ 1) * L::kStage, b, kv, key + kKeys);
    copy_async_commit();
    if (key >= warp_sees) continue;  // the same for a whole warp
    const int limit = a.causal ? offset + t0 - key + 1 : a.keys;
    step<T, D>(dq, at, L::kK + stage * L::kStage, lse, delta, a.scale * kLog2e,
               kKeys > limit || key + kKeys > a.keys, limit, a.keys - key, warp, lane);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    by_keys::store<T, D>(a.dq, dq[i], a.scale, b, h, t0 + (warp * kTiles + i) * 16, a.queries,
                         a.size, lane);
}

}  // namespace by_queries

template <class T, int D> void launch(AttentionArgs a, void* dy16, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(a.batches) * a.queries * a.heads;
  prepare_kernel<T><<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), kThreads, 0, stream>>>(
      a, static_cast<uint16_t*>(dy16));
  const int64_t row = static_cast<int64_t>(a.heads) * a.size;
  if (!a.dy.narrow) a.dy = {dy16, a.queries * row, row, a.size, true};

  using Keys = by_keys::Layout<D>;
  allow_shared(by_keys::kernel<T, D>, Keys::kBytes);
  const dim3 key_grid(static_cast<unsigned>(a.batches * a.kv_heads * a.parts),
                      static_cast<unsigned>((a.keys + by_keys::kKeys - 1) / by_keys::kKeys));
  by_keys::kernel<T, D><<<key_grid, kThreads, Keys::kBytes, stream>>>(a);

  constexpr int kBytes = by_queries::Layout<D>::kBytes;
  allow_shared(by_queries::kernel<T, D>, kBytes);
  const dim3 query_grid(
      static_cast<unsigned>(a.batches * a.heads),
      static_cast<unsigned>((a.queries + by_queries::kQueries - 1) / by_queries::kQueries));
  by_queries::kernel<T, D><<<query_grid, kThreads, kBytes, stream>>>(a);
}

}  // namespace

int attention_mma_parts(const AttentionArgs& a, int multiprocessors) {
  const int tiles = (a.keys + by_keys::kKeys - 1) / by_keys::kKeys;
  return a.batches * a.kv_heads * tiles >= 4 * multiprocessors ? 1 : a.heads / a.kv_heads;
}

void attention_mma_vjp(AttentionArgs a, void* dy16, bool bf16, cudaStream_t stream) {
  if (a.size <= 64)
    bf16 ? launch<Bf16, 64>(a, dy16, stream) : launch<F16, 64>(a, dy16, stream);
  else
    bf16 ? launch<Bf16, 128>(a, dy16, stream) : launch<F16, 128>(a, dy16, stream);
}

void attention_fold(void* out, bool narrow, bool bf16, const float* in, int64_t rows, int parts,
                    int size, cudaStream_t stream) {
  const int64_t pairs = rows * size / 2;
  const auto blocks = static_cast<unsigned>((pairs + kThreads - 1) / kThreads);
  const HeadRows to{out, 0, 0, 0, narrow};
  if (bf16)
    fold_kernel<Bf16><<<blocks, kThreads, 0, stream>>>(to, in, pairs, parts, size);
  else
    fold_kernel<F16><<<blocks, kThreads, 0, stream>>>(to, in, pairs, parts, size);
}

}  // namespace omq::cuda
