// One query head of one new token against its cache, by a block: what decode_attention.cu launches
// over heads, splits and sequences.
#pragma once

#include "cuda/decode_cache.cuh"
#include "cuda/packed_kernels.cuh"
#include "cuda/prepared_row.cuh"
#include "tensor/decode_kernels.h"

namespace omq::cuda {

constexpr int kAttentionTokens = 4;  // tokens of a warp at a time
constexpr int kMostSplits = static_cast<int>(kDecodeMostSplits);

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
  CacheArgs keys, values;
  float *parts, *y;
  int32_t* arrived;
  int heads, kv_heads, dim, capacity, splits, positions;
  int group;                               // query heads of a key head
  uint32_t inverse_group, inverse_splits;  // for quotient()
  float scale;
  char* prepared;      // where y is left as prepared_row.cuh has it, or null,
  int padded;          // in so many columns
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

// One head by one warp: out[d] in shared memory. Gives the grid that it was rounded to, if it was.
template <int kPairs>
__device__ __forceinline__ RowGrid<float> prepare_head(float* out, const float* x,
                                                       const HeadForm& f,
                                                       const Rotation<kPairs>& turn, int d,
                                                       int lane) {
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
  RowGrid<float> g{};
  if (f.quantise) {
    g = row_grid(team_max<32>(hi), -team_max<32>(lo), f.s);
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
  return g;
}

// Scores are exponents of two, and what they are measured from is the largest; of none, 0.
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

// What a set of tokens gives: the largest score, Σ exp, and the weighted values: of this lane's
// elements, or of one.
template <int kEach> struct Sums {
  float top = -INFINITY, weight = 0, value[kEach] = {};
};

// Joins up to kMost such sets, in their order. top(i), weight(i), value(i), of which the first
// `count` are there: all are read side by side.
template <int kMost, class Top, class Weight, class Value>
__device__ __forceinline__ Sums<1> join(int count, Top&& top, Weight&& weight, Value&& value) {
  float tops[kMost], weights[kMost], values[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int at = min(i, count - 1);
    tops[i] = top(at), weights[i] = weight(at), values[i] = value(at);
    if (i >= count) tops[i] = -INFINITY;
  }
  Sums<1> all;
#pragma unroll
  for (int i = 0; i < kMost; ++i) all.top = fmaxf(all.top, tops[i]);
  const float base = base_of(all.top);
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const float by = exp2_fast(tops[i] - base);
    all.weight += weights[i] * by;
    all.value[0] += values[i] * by;
  }
  return all;
}

// Tokens of a split, of so many in a cache.
__device__ __forceinline__ int split_tokens(const AttentionArgs& a, int tokens) {
  return max(static_cast<int>(kDecodeSplitTokens),
             quotient(tokens + a.splits - 1, a.inverse_splits));
}

template <int kEach, int kWarps> struct AttentionMemory {  // shared
  static constexpr int kMostDim = 32 * kEach;
  float q[kMostDim], k_new[kMostDim], v_new[kMostDim];
  alignas(16) uint16_t k_stored[kMostDim], v_stored[kMostDim];  // the same as the cache has them
  float2 k_grid, v_grid;
  float tops[kWarps], weights[kWarps], values[kWarps][kMostDim];
  // Of a head's splits, in the first block of a cluster.
  float split_tops[kMostSplits], split_weights[kMostSplits], split_values[kMostSplits][kMostDim];
  int last;
};

// What the split's tokens give, of element min(thread, d − 1). All of the block's kWarps warps call
// it. T: of the cache, see CachedHead; a head has kEach elements a lane, a multiple of kEach in
// all.
template <class T, int kEach, int kWarps>
__device__ __forceinline__ Sums<1> attend(const AttentionArgs& a, AttentionMemory<kEach, kWarps>& m,
                                          int position, int head, int begin, int end, int row) {
  constexpr int kTokens = kAttentionTokens;
  using Cached = CachedHead<T, kEach>;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int kv = quotient(head, a.inverse_group), d = a.dim;
  const int64_t first = static_cast<int64_t>(row) * a.capacity * a.kv_heads + kv;
  const bool mine = lane * kEach < d;
  const int own = mine ? lane * kEach : 0;
  const Cached keys(a.keys, first, a.kv_heads, d, own), values(a.values, first, a.kv_heads, d, own);
  typename Cached::Raw k_raw[kTokens], v_raw[kTokens];
  const auto fetch = [&](int t0) {  // all loads first, none behind a condition
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const int token = min(t0 + u * kWarps, end - 1);
      k_raw[u] = keys.fetch(token);
      v_raw[u] = values.fetch(token);
    }
  };
  // The newest token's are not in the cache yet.
  const CacheArgs new_key{m.k_stored, &m.k_grid}, new_value{m.v_stored, &m.v_grid};
  const auto fetch_newest = [&](int t0) {
    if (position - t0 >= kTokens * kWarps) return;
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      if (t0 + u * kWarps != position) continue;
      k_raw[u] = Cached(new_key, 0, 1, d, own).fetch(0);
      v_raw[u] = Cached(new_value, 0, 1, d, own).fetch(0);
    }
  };
  fetch(begin + warp);  // older tokens' were there before this step began
  const Rotation<kEach / 2> turn(a, position, lane);
  wait_for_previous();
  const float* qkv = a.qkv + static_cast<int64_t>(row) * (a.heads + 2 * a.kv_heads) * d;
  const bool is_new = (warp == 1 || warp == 2) && end == position + 1;
  if (warp == 0 || is_new) {  // q; and the new k and v, by a warp each
    const HeadForm& form = warp == 0 ? a.q : warp == 1 ? a.k : a.v;
    float* out = warp == 0 ? m.q : warp == 1 ? m.k_new : m.v_new;
    const int at = warp == 0 ? head : warp == 1 ? a.heads + kv : a.heads + a.kv_heads + kv;
    const RowGrid<float> grid = prepare_head(out, qkv + at * d, form, turn, d, lane);
    if (is_new) {
      __syncwarp();
      const auto write = [&](const CacheArgs& to, int64_t cache_row) {
        Cached::write(to, cache_row, d, out, grid, form.s, lane);
      };
      write(select(warp == 1, new_key, new_value), 0);
      if (head == kv * a.group)
        write(select(warp == 1, a.keys, a.values),
              first + static_cast<int64_t>(position) * a.kv_heads);
    }
  }
  __syncthreads();
  float q[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) q[j] = mine ? m.q[lane * kEach + j] * a.scale : 0.0f;
  Sums<kEach> sums;
#pragma unroll 1
  for (int t0 = begin + warp; t0 < end;) {
    fetch_newest(t0);  // here, where the others are waited for
    float score[kTokens], v[kTokens][kEach], v_scale[kTokens];
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      float s = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        s += q[j] * Cached::value(k_raw[u], j);
        v[u][j] = Cached::value(v_raw[u], j);
      }
      score[u] = mine ? s * Cached::scale(k_raw[u]) : 0.0f;
      v_scale[u] = Cached::scale(v_raw[u]);
    }
    const int left = (end - t0 + kWarps - 1) / kWarps;  // of these tokens
    t0 += kWarps * kTokens;
    if (t0 < end) fetch(t0);
    float top = sums.top;
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      score[u] = team_sum<32>(score[u]);
      if (u >= left) score[u] = -INFINITY;
      top = fmaxf(top, score[u]);
    }
    const float base = base_of(top), keep = exp2_fast(sums.top - base);
    sums.top = top;
    sums.weight *= keep;
#pragma unroll
    for (int j = 0; j < kEach; ++j) sums.value[j] *= keep;
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      if (u >= left) break;  // what stands there may be no number
      const float by = exp2_fast(score[u] - base);
      sums.weight += by;
#pragma unroll
      for (int j = 0; j < kEach; ++j) sums.value[j] += v[u][j] * (by * v_scale[u]);
    }
  }
  if (lane == 0) m.tops[warp] = sums.top, m.weights[warp] = sums.weight;
#pragma unroll
  for (int j = 0; j < kEach; ++j) m.values[warp][lane * kEach + j] = sums.value[j];
  __syncthreads();
  const int element = min(static_cast<int>(threadIdx.x), d - 1);
  return join<kWarps>(
      kWarps, [&](int w) { return m.tops[w]; }, [&](int w) { return m.weights[w]; },
      [&](int w) { return m.values[w][element]; });
}

// The head's result, element by element.
__device__ __forceinline__ void write_head(const AttentionArgs& a, const Sums<1>& all, int head,
                                           int row) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= a.dim) return;
  const float v = all.value[0] / all.weight;
  a.y[(static_cast<int64_t>(row) * a.heads + head) * a.dim + i] = v;
  if (a.prepared)  // one sequence, heads of 32·n: whole warps get here
    PreparedRow(a.prepared, a.padded).put(head * a.dim + i, v);
}

// Joins the splits of a head through device memory: the last of its blocks to arrive does.
template <int kEach, int kWarps>
__device__ __forceinline__ void join_by_arrival(const AttentionArgs& a,
                                                AttentionMemory<kEach, kWarps>& m,
                                                const Sums<1>& mine, int head, int split,
                                                int active, int row) {
  const int d = a.dim, i = static_cast<int>(threadIdx.x);
  const int64_t at = static_cast<int64_t>(row) * a.heads + head;
  float* parts = a.parts + at * a.splits * (d + 2);
  float* part = parts + static_cast<int64_t>(split) * (d + 2);
  if (i == 0) part[d] = mine.top, part[d + 1] = mine.weight;
  if (i < d) part[i] = mine.value[0];
  __threadfence();
  __syncthreads();
  if (i == 0) m.last = atomicAdd(a.arrived + at, 1) == active - 1;
  __syncthreads();
  if (!m.last) return;
  __threadfence();
  const auto read = [&](int s, int what) {
    return __ldcg(parts + static_cast<int64_t>(s) * (d + 2) + what);
  };
  write_head(a,
             join<kMostSplits>(
                 active, [&](int s) { return read(s, d); }, [&](int s) { return read(s, d + 1); },
                 [&](int s) { return read(s, min(i, d - 1)); }),
             head, row);
  if (i == 0) a.arrived[at] = 0;
}

// Through the shared memory of the first block of a cluster (compute capability 9.0), whose blocks
// are the splits of a head. All threads of all its blocks call it, behind a cluster_arrive().
template <int kEach, int kWarps>
__device__ __forceinline__ void join_in_cluster(const AttentionArgs& a,
                                                AttentionMemory<kEach, kWarps>& m,
                                                const Sums<1>& mine, int head, int split,
                                                int active, int row) {
  const int i = static_cast<int>(threadIdx.x), element = min(i, a.dim - 1);
  cluster_wait();  // the first block has begun
  if (split < active) {
    if (i == 0) {
      store_in_cluster(shared_address(m.split_tops + split), 0, mine.top);
      store_in_cluster(shared_address(m.split_weights + split), 0, mine.weight);
    }
    if (i < a.dim) store_in_cluster(shared_address(m.split_values[split] + i), 0, mine.value[0]);
  }
  cluster_barrier();
  if (split != 0) return;
  write_head(
      a,
      join<kMostSplits>(
          active, [&](int s) { return m.split_tops[s]; }, [&](int s) { return m.split_weights[s]; },
          [&](int s) { return m.split_values[s][element]; }),
      head, row);
}

}  // namespace omq::cuda
