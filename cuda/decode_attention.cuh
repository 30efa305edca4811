// One query head of one new token against its cache, by a block: what decode_attention.cu launches
// over heads, splits and sequences.
#pragma once

#include "cuda/packed_kernels.cuh"
#include "tensor/decode_kernels.h"
#include "tensor/row_quant.h"

namespace omq::cuda {

constexpr int kAttentionTokens = 4;  // tokens of a warp at a time

struct HeadForm {  // what happens to a head of q, k or v on its way
  const float* gain = nullptr;
  float eps = 0;
  bool rotate = false, quantise = false;
  RowQuant s;
};

struct AttentionArgs {
  const float *qkv, *cos, *sin;
  const int32_t* position;  // [rows]
  HeadForm q, k, v;
  Operand keys, values;
  float *parts, *y;
  int32_t* arrived;
  int heads, kv_heads, dim, capacity, splits, positions;
  float scale;
  const char* next;    // weights that are wanted in the L2 cache,
  uint32_t next_each;  // so many bytes by each block
};

// The rotation of a position: of a lane's pairs (lane + 32 j, lane + 32 j + d/2).
template <int kPairs> struct Rotation {
  float cos[kPairs], sin[kPairs];
  __device__ __forceinline__ Rotation(const AttentionArgs& a, int position, int lane) {
    const int half = a.dim / 2;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int64_t at = static_cast<int64_t>(position) * half + min(lane + 32 * j, half - 1);
      cos[j] = a.cos[at], sin[j] = a.sin[at];
    }
  }
};

// One head by one warp: out[d] in shared memory.
template <int kPairs>
__device__ __forceinline__ void prepare_head(float* out, const float* x, const HeadForm& f,
                                             const Rotation<kPairs>& turn, int d, int lane) {
  const int half = d / 2;
  float v[2][kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      v[h][j] = lane + 32 * j < half ? __ldcg(x + lane + 32 * j + h * half) : 0.0f;
  if (f.gain) {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) squares += v[0][j] * v[0][j] + v[1][j] * v[1][j];
    const float r = rsqrtf(team_sum<32>(squares) / static_cast<float>(d) + f.eps);
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) v[h][j] *= r * f.gain[min(lane + 32 * j, half - 1) + h * half];
  }
  float hi = -INFINITY, lo = -INFINITY;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const float first = v[0][j], second = v[1][j];
    if (f.rotate) {
      v[0][j] = first * turn.cos[j] - second * turn.sin[j];
      v[1][j] = second * turn.cos[j] + first * turn.sin[j];
    }
    if (lane + 32 * j >= half) continue;
    hi = fmaxf(hi, fmaxf(v[0][j], v[1][j]));
    lo = fmaxf(lo, -fminf(v[0][j], v[1][j]));
  }
  if (f.quantise) {
    const RowGrid<float> g = row_grid(team_max<32>(hi), -team_max<32>(lo), f.s);
    const float top = static_cast<float>((1 << f.s.bits) - 1);
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) v[h][j] = (row_code(v[h][j], g, top) - g.zero) * g.scale;
  }
#pragma unroll
  for (int j = 0; j < kPairs; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (lane + 32 * j < half) out[lane + 32 * j + h * half] = v[h][j];
}

// What a set of tokens gives: the largest score, Σ exp, and the weighted values of this lane.
template <int kEach> struct Sums {
  float top = -INFINITY, weight = 0, value[kEach] = {};
  __device__ __forceinline__ void add(float score, float other_weight, const float (&v)[kEach]) {
    const float t = fmaxf(top, score);
    if (t == -INFINITY) return;
    const float keep = exp2_fast(top - t), in = exp2_fast(score - t);
    weight = weight * keep + other_weight * in;
#pragma unroll
    for (int j = 0; j < kEach; ++j) value[j] = value[j] * keep + v[j] * in;
    top = t;
  }
};

// A lane's kEach neighbouring elements of a head, in one load.
template <class T, int kEach> struct alignas(sizeof(T) * kEach) Elements { T v[kEach]; };

// How the tokens of a cache are shared out.
struct SplitTokens {
  int per, count;  // tokens of a split, splits that have any
  __device__ SplitTokens(int tokens, int splits)
      : per(max(static_cast<int>(kDecodeSplitTokens), (tokens + splits - 1) / splits)),
        count((tokens + per - 1) / per) {}
};

template <int kEach, int kWarps> struct AttentionMemory {  // shared
  float q[32 * kEach], k_new[32 * kEach], v_new[32 * kEach];
  float tops[kWarps], weights[kWarps], values[kWarps][32 * kEach];
  float top, weight, value[32 * kEach];  // of the split
  int last;
};

// What the split's tokens give, in the block's warp 0 (all of its kWarps warps call it). T: of the
// cache; a head has kEach elements a lane, a multiple of kEach in all.
template <class T, int kEach, int kWarps>
__device__ __forceinline__ Sums<kEach> attend(const AttentionArgs& a,
                                              AttentionMemory<kEach, kWarps>& m, int position,
                                              int head, const SplitTokens& of, int split, int row) {
  constexpr int kTokens = kAttentionTokens;
  using Part = Elements<T, kEach>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int group = a.heads / a.kv_heads, kv = head / group, d = a.dim;
  const int tokens = position + 1;
  const int begin = split * of.per, end = min(tokens, begin + of.per);
  const int64_t step = static_cast<int64_t>(a.kv_heads) * d;  // from token to token
  const int64_t first =
      static_cast<int64_t>(row) * a.capacity * step + static_cast<int64_t>(kv) * d;
  const bool mine = lane * kEach < d;
  Part k_raw[kTokens], v_raw[kTokens];
  const auto fetch = [&](int t0) {  // all loads first, none behind a condition
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const int64_t at = first + min(t0 + u * kWarps, end - 1) * step + (mine ? lane * kEach : 0);
      k_raw[u] = *reinterpret_cast<const Part*>(static_cast<const T*>(a.keys.data) + at);
      v_raw[u] = *reinterpret_cast<const Part*>(static_cast<const T*>(a.values.data) + at);
    }
  };
  // Older tokens' keys and values were there before this step began; the newest one's are not
  // taken from the cache.
  fetch(begin + warp);
  const Rotation<kEach / 2> turn(a, position, lane);
  wait_for_previous();
  const float* qkv = a.qkv + static_cast<int64_t>(row) * (a.heads + 2 * a.kv_heads) * d;
  if (warp == 0 || (warp <= 2 && end == tokens)) {  // q; and the new k and v, by a warp each
    const HeadForm& form = warp == 0 ? a.q : warp == 1 ? a.k : a.v;
    float* out = warp == 0 ? m.q : warp == 1 ? m.k_new : m.v_new;
    const int at = warp == 0 ? head : warp == 1 ? a.heads + kv : a.heads + a.kv_heads + kv;
    prepare_head(out, qkv + at * d, form, turn, d, lane);
    if (warp > 0 && head % group == 0) {
      __syncwarp();
#pragma unroll 1
      for (int i = lane; i < d; i += 32)
        store(warp == 1 ? a.keys : a.values, first + position * step + i, out[i]);
    }
  }
  __syncthreads();
  float q[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) q[j] = mine ? m.q[lane * kEach + j] * a.scale : 0.0f;
  Sums<kEach> sums;
#pragma unroll 1
  for (int t0 = begin + warp; t0 < end;) {
    float score[kTokens], v[kTokens][kEach];
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const bool fresh = t0 + u * kWarps == position;
      float s = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int i = lane * kEach + j;  // inside the arrays for every lane
        s += q[j] * (fresh ? m.k_new[i] : static_cast<float>(k_raw[u].v[j]));
        v[u][j] = fresh ? m.v_new[i] : static_cast<float>(v_raw[u].v[j]);
      }
      score[u] = mine ? s : 0.0f;
    }
    const int now = t0;
    t0 += kWarps * kTokens;
    if (t0 < end) fetch(t0);
#pragma unroll
    for (int u = 0; u < kTokens; ++u) score[u] = team_sum<32>(score[u]);
#pragma unroll
    for (int u = 0; u < kTokens; ++u)
      if (now + u * kWarps < end) sums.add(score[u], 1.0f, v[u]);
  }
  if (lane == 0) m.tops[warp] = sums.top, m.weights[warp] = sums.weight;
#pragma unroll
  for (int j = 0; j < kEach; ++j) m.values[warp][lane * kEach + j] = sums.value[j];
  __syncthreads();
  Sums<kEach> all;
  if (warp == 0) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      float v[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) v[j] = m.values[w][lane * kEach + j];
      all.add(m.tops[w], m.weights[w], v);
    }
  }
  return all;
}

// The head's result, by a warp.
template <int kEach>
__device__ __forceinline__ void write_head(const AttentionArgs& a, const Sums<kEach>& all, int head,
                                           int row, int lane) {
  float* y = a.y + (static_cast<int64_t>(row) * a.heads + head) * a.dim;
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (lane * kEach < a.dim) y[lane * kEach + j] = all.value[j] / all.weight;
}

// Joins the splits of a head, in their order: get(s, top, weight, value) reads what split s gave.
template <int kEach, class Get>
__device__ __forceinline__ Sums<kEach> join_splits(int active, Get&& get) {
  constexpr int kParts = 4;  // under way together
  Sums<kEach> all;
#pragma unroll 1
  for (int s0 = 0; s0 < active; s0 += kParts) {
    float top[kParts], weight[kParts], v[kParts][kEach];
#pragma unroll
    for (int u = 0; u < kParts; ++u) get(min(s0 + u, active - 1), top[u], weight[u], v[u]);
#pragma unroll
    for (int u = 0; u < kParts; ++u)
      if (s0 + u < active) all.add(top[u], weight[u], v[u]);
  }
  return all;
}

// Through device memory, by warp 0 of each block: the last of a head to arrive joins.
template <int kEach, int kWarps>
__device__ __forceinline__ void join_by_arrival(const AttentionArgs& a,
                                                AttentionMemory<kEach, kWarps>& m,
                                                const Sums<kEach>& mine, int head, int split,
                                                int active, int row) {
  const int lane = static_cast<int>(threadIdx.x) % 32, d = a.dim;
  const bool there = lane * kEach < d;
  const int64_t at = static_cast<int64_t>(row) * a.heads + head;
  float* parts = a.parts + at * a.splits * (d + 2);
  float* part = parts + static_cast<int64_t>(split) * (d + 2);
  if (lane == 0) part[d] = mine.top, part[d + 1] = mine.weight;
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (there) part[lane * kEach + j] = mine.value[j];
  __threadfence();
  __syncwarp();
  if (lane == 0) m.last = atomicAdd(a.arrived + at, 1) == active - 1;
  __syncwarp();
  if (!m.last) return;
  __threadfence();
  const auto get = [&](int s, float& top, float& weight, float(&v)[kEach]) {
    const float* p = parts + static_cast<int64_t>(s) * (d + 2);
    top = __ldcg(p + d);
    weight = __ldcg(p + d + 1);
#pragma unroll
    for (int j = 0; j < kEach; ++j) v[j] = __ldcg(p + (there ? lane * kEach + j : 0));
  };
  write_head(a, join_splits<kEach>(active, get), head, row, lane);
  if (lane == 0) a.arrived[at] = 0;
}

// Through the shared memory of a cluster (compute capability 9.0), whose blocks are the splits of a
// head: the first block joins. All threads of all its blocks call it.
template <int kEach, int kWarps>
__device__ __forceinline__ void join_in_cluster(const AttentionArgs& a,
                                                AttentionMemory<kEach, kWarps>& m,
                                                const Sums<kEach>& mine, int head, int split,
                                                int active, int row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool first_warp = threadIdx.x < 32;
  if (first_warp && split < active) {
    if (lane == 0) m.top = mine.top, m.weight = mine.weight;
#pragma unroll
    for (int j = 0; j < kEach; ++j) m.value[lane * kEach + j] = mine.value[j];
  }
  cluster_barrier();
  if (first_warp && split == 0) {
    const uint32_t top_at = shared_address(&m.top), weight_at = shared_address(&m.weight),
                   value_at = shared_address(m.value + lane * kEach);
    const auto get = [&](int s, float& top, float& weight, float(&v)[kEach]) {
      const auto block = static_cast<uint32_t>(s);
      top = load_from_cluster(top_at, block);
      weight = load_from_cluster(weight_at, block);
#pragma unroll
      for (int j = 0; j < kEach; ++j) v[j] = load_from_cluster(value_at + 4 * j, block);
    };
    write_head(a, join_splits<kEach>(active, get), head, row, lane);
  }
  cluster_barrier();  // nobody leaves while its memory is read
}

}  // namespace omq::cuda
