// Causal attention in F32 without tensor cores, for any head size: what the 16-bit kernels are
// judged by, and the path of Compute::F32.
//
// A block of 16 × 16 threads works on tiles of 64 rows by 64 columns, four by four a thread; scores
// are formed over the whole head size in chunks of 32, results over slabs of 128 columns
// (blockIdx.z), so that neither registers nor shared memory depend on d. Formulas as in
// attention_mma.cu and attention_mma_vjp.cu; every sum has one owner and one order.
#include "cuda/attention.h"

namespace omq::cuda {
namespace {

constexpr int kTile = 64, kChunk = 32, kSlab = 128, kThreads = 256, kPad = 4;

// Shared memory of a block: chunks of two score operands, or of one value operand; and a tile of
// probabilities (or of dS), columns first.
struct Shared {
  union {
    struct {
      float left[kChunk][kTile + kPad], right[kChunk][kTile + kPad];
    };
    float values[kChunk][kSlab + kPad];
  };
  float weights[kTile][kTile + kPad];
};

struct Rows {  // 64 rows of one head, `count` of which exist
  const float* data;
  int64_t stride;
  int count;
};
__device__ Rows rows_of(const HeadRows& x, int b, int head, int first, int all) {
  return {static_cast<const float*>(x.data) + b * x.batch + head * x.head + first * x.row, x.row,
          all - first};
}

struct Thread {
  int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
};

// s [r][c] = left row 4 y + r · right row 4 x + c.
__device__ void scores(float (&s)[4][4], Shared& m, Rows left, Rows right, int size, Thread at) {
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) s[r][c] = 0.0f;
  const int column = static_cast<int>(threadIdx.x) % kChunk;
  for (int k0 = 0; k0 < size; k0 += kChunk) {
    __syncthreads();
    for (int row = static_cast<int>(threadIdx.x) / kChunk; row < kTile; row += kThreads / kChunk) {
      const bool inside = k0 + column < size;
      m.left[column][row] =
          inside && row < left.count ? left.data[row * left.stride + k0 + column] : 0.0f;
      m.right[column][row] =
          inside && row < right.count ? right.data[row * right.stride + k0 + column] : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kChunk; ++k) {
      const float4 a = *reinterpret_cast<const float4*>(&m.left[k][at.y * 4]);
      const float4 b = *reinterpret_cast<const float4*>(&m.right[k][at.x * 4]);
      const float av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) s[r][c] = fmaf(av[r], bv[c], s[r][c]);
    }
  }
}

// sum [r][h][c] += Σ_k w [4 y + r][k] · values row k, column slab + 64 h + 4 x + c; w is given as
// each thread's four by four.
__device__ void accumulate(float (&sum)[4][2][4], const float (&w)[4][4], Shared& m, Rows values,
                           int slab, int size, Thread at) {
  __syncthreads();
#pragma unroll
  for (int c = 0; c < 4; ++c)
    *reinterpret_cast<float4*>(&m.weights[at.x * 4 + c][at.y * 4]) =
        make_float4(w[0][c], w[1][c], w[2][c], w[3][c]);
  const int column = static_cast<int>(threadIdx.x) % kSlab;
  for (int k0 = 0; k0 < kTile; k0 += kChunk) {
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x) / kSlab; k < kChunk; k += kThreads / kSlab)
      m.values[k][column] = k0 + k < values.count && slab + column < size
                                ? values.data[(k0 + k) * values.stride + slab + column]
                                : 0.0f;
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kChunk; ++k) {
      const float4 a = *reinterpret_cast<const float4*>(&m.weights[k0 + k][at.y * 4]);
      const float av[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 b = *reinterpret_cast<const float4*>(&m.values[k][h * 64 + at.x * 4]);
        const float bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][h][c] = fmaf(av[r], bv[c], sum[r][h][c]);
      }
    }
  }
}

// Rows of `out` = factor[r] · sum.
__device__ void store(const HeadRows& out, const float (&sum)[4][2][4], const float (&factor)[4],
                      int b, int head, int first, int all, int slab, int size, Thread at) {
  for (int r = 0; r < 4; ++r) {
    const int row = first + at.y * 4 + r;
    if (row >= all) continue;
    float* to = static_cast<float*>(out.data) + b * out.batch + head * out.head + row * out.row;
    for (int h = 0; h < 2; ++h)
      for (int c = 0; c < 4; ++c) {
        const int column = slab + h * 64 + at.x * 4 + c;
        if (column < size) to[column] = factor[r] * sum[r][h][c];
      }
  }
}

// Over the 16 threads of a row of the tile.
__device__ float row_max(float x) {
  for (int i = 8; i > 0; i >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i, 16));
  return x;
}
__device__ float row_sum(float x) {
  for (int i = 8; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i, 16);
  return x;
}

// Whether query t sees key s.
__device__ bool visible(const AttentionArgs& a, int t, int s) {
  return s < a.keys && (!a.causal || s <= a.keys - a.queries + t);
}

struct Where {  // of a block that owns queries
  int b, h, kv, t0, seen, slab;
  __device__ explicit Where(const AttentionArgs& a)
      : b(static_cast<int>(blockIdx.x) / a.heads),
        h(static_cast<int>(blockIdx.x) % a.heads),
        kv(h / (a.heads / a.kv_heads)),
        t0(static_cast<int>(gridDim.y - 1 - blockIdx.y) * kTile),
        seen(a.causal ? a.keys - a.queries + min(t0 + kTile, a.queries) : a.keys),
        slab(static_cast<int>(blockIdx.z) * kSlab) {}
};

__global__ void __launch_bounds__(kThreads) forward_kernel(const AttentionArgs a) {
  __shared__ __align__(16) char memory[sizeof(Shared)];
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const Thread at;
  const Where is(a);
  const Rows q = rows_of(a.q, is.b, is.h, is.t0, a.queries);
  float o[4][2][4] = {}, top[4], total[4] = {};
  for (int r = 0; r < 4; ++r) top[r] = -INFINITY;
  for (int key = 0; key < is.seen; key += kTile) {
    float s[4][4];
    scores(s, m, q, rows_of(a.k, is.b, is.kv, key, a.keys), a.size, at);
    for (int r = 0; r < 4; ++r) {
      float most = top[r], sum = 0.0f;
      for (int c = 0; c < 4; ++c) {
        const bool see = visible(a, is.t0 + at.y * 4 + r, key + at.x * 4 + c);
        s[r][c] = see ? s[r][c] * a.scale : -INFINITY;
        most = fmaxf(most, s[r][c]);
      }
      most = row_max(most);
      const float shrink = expf(top[r] - most);
      top[r] = most;
      for (int c = 0; c < 4; ++c) sum += s[r][c] = expf(s[r][c] - most);
      total[r] = total[r] * shrink + row_sum(sum);
      for (int h = 0; h < 2; ++h)
        for (int c = 0; c < 4; ++c) o[r][h][c] *= shrink;
    }
    accumulate(o, s, m, rows_of(a.v, is.b, is.kv, key, a.keys), is.slab, a.size, at);
  }
  float inverse[4];
  for (int r = 0; r < 4; ++r) {
    const int t = is.t0 + at.y * 4 + r;
    inverse[r] = 1.0f / total[r];
    if (is.slab == 0 && at.x == 0 && t < a.queries)
      a.lse[(static_cast<int64_t>(is.b) * a.heads + is.h) * a.queries + t] =
          top[r] + logf(total[r]);
  }
  store(a.y, o, inverse, is.b, is.h, is.t0, a.queries, is.slab, a.size, at);
}

// delta = Σ dy ⊙ y, a warp per row.
__global__ void __launch_bounds__(kThreads) delta_kernel(const AttentionArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(a.batches) * a.heads * a.queries) return;
  const int t = static_cast<int>(row % a.queries), h = static_cast<int>(row / a.queries % a.heads);
  const int b = static_cast<int>(row / a.queries / a.heads);
  const Rows y = rows_of(a.y, b, h, t, a.queries), dy = rows_of(a.dy, b, h, t, a.queries);
  float sum = 0.0f;
  for (int i = lane; i < a.size; i += 32) sum = fmaf(y.data[i], dy.data[i], sum);
  for (int i = 16; i > 0; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  if (lane == 0) a.delta[row] = sum;
}

// What the forward left of one query.
struct Stats {
  float lse, delta;
  __device__ Stats(const AttentionArgs& a, int b, int h, int t) {
    const int64_t at = (static_cast<int64_t>(b) * a.heads + h) * a.queries + t;
    lse = t < a.queries ? a.lse[at] : 0.0f;
    delta = t < a.queries ? a.delta[at] : 0.0f;
  }
};

__global__ void __launch_bounds__(kThreads) vjp_queries_kernel(const AttentionArgs a) {
  __shared__ __align__(16) char memory[sizeof(Shared)];
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const Thread at;
  const Where is(a);
  const Rows q = rows_of(a.q, is.b, is.h, is.t0, a.queries),
             dy = rows_of(a.dy, is.b, is.h, is.t0, a.queries);
  float dq[4][2][4] = {};
  for (int key = 0; key < is.seen; key += kTile) {
    const Rows k = rows_of(a.k, is.b, is.kv, key, a.keys);
    float s[4][4], ds[4][4];
    scores(s, m, q, k, a.size, at);
    scores(ds, m, dy, rows_of(a.v, is.b, is.kv, key, a.keys), a.size, at);
    for (int r = 0; r < 4; ++r) {
      const int t = is.t0 + at.y * 4 + r;
      const Stats row(a, is.b, is.h, t);
      for (int c = 0; c < 4; ++c)
        ds[r][c] = visible(a, t, key + at.x * 4 + c)
                       ? expf(s[r][c] * a.scale - row.lse) * (ds[r][c] - row.delta)
                       : 0.0f;
    }
    accumulate(dq, ds, m, k, is.slab, a.size, at);
  }
  const float factor[4] = {a.scale, a.scale, a.scale, a.scale};
  store(a.dq, dq, factor, is.b, is.h, is.t0, a.queries, is.slab, a.size, at);
}

// Tiles are transposed here: rows are keys, columns queries.
__global__ void __launch_bounds__(kThreads) vjp_keys_kernel(const AttentionArgs a) {
  __shared__ __align__(16) char memory[sizeof(Shared)];
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const Thread at;
  const int b = static_cast<int>(blockIdx.x) / a.kv_heads;
  const int kv = static_cast<int>(blockIdx.x) % a.kv_heads, group = a.heads / a.kv_heads;
  const int s0 = static_cast<int>(blockIdx.y) * kTile;
  const int slab = static_cast<int>(blockIdx.z) * kSlab;
  const int first = a.causal ? max(0, s0 - (a.keys - a.queries)) / kTile * kTile : 0;
  const Rows k = rows_of(a.k, b, kv, s0, a.keys), v = rows_of(a.v, b, kv, s0, a.keys);
  float dk[4][2][4] = {}, dv[4][2][4] = {};
  for (int h = kv * group; h < (kv + 1) * group; ++h)
    for (int t0 = first; t0 < a.queries; t0 += kTile) {
      const Rows q = rows_of(a.q, b, h, t0, a.queries), dy = rows_of(a.dy, b, h, t0, a.queries);
      float p[4][4], ds[4][4];
      scores(p, m, k, q, a.size, at);
      scores(ds, m, v, dy, a.size, at);
      for (int c = 0; c < 4; ++c) {
        const int t = t0 + at.x * 4 + c;
        const Stats column(a, b, h, t);
        for (int r = 0; r < 4; ++r) {
          const bool see = t < a.queries && visible(a, t, s0 + at.y * 4 + r);
          p[r][c] = see ? expf(p[r][c] * a.scale - column.lse) : 0.0f;
          ds[r][c] = p[r][c] * (ds[r][c] - column.delta);
        }
      }
      accumulate(dv, p, m, dy, slab, a.size, at);
      accumulate(dk, ds, m, q, slab, a.size, at);
    }
  const float scale[4] = {a.scale, a.scale, a.scale, a.scale}, one[4] = {1, 1, 1, 1};
  store(a.dk, dk, scale, b, kv, s0, a.keys, slab, a.size, at);
  store(a.dv, dv, one, b, kv, s0, a.keys, slab, a.size, at);
}

unsigned pieces(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }

}  // namespace

void attention_plain(const AttentionArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.batches * a.heads), pieces(a.queries, kTile),
                  pieces(a.size, kSlab));
  forward_kernel<<<grid, kThreads, 0, stream>>>(a);
}

void attention_plain_vjp(const AttentionArgs& a, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(a.batches) * a.heads * a.queries;
  delta_kernel<<<pieces(rows, kThreads / 32), kThreads, 0, stream>>>(a);
  const unsigned slabs = pieces(a.size, kSlab);
  const dim3 query_grid(static_cast<unsigned>(a.batches * a.heads), pieces(a.queries, kTile),
                        slabs);
  vjp_queries_kernel<<<query_grid, kThreads, 0, stream>>>(a);
  const dim3 key_grid(static_cast<unsigned>(a.batches * a.kv_heads), pieces(a.keys, kTile), slabs);
  vjp_keys_kernel<<<key_grid, kThreads, 0, stream>>>(a);
}

}  // namespace omq::cuda
