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
  const int32_t* position;
  HeadForm q, k, v;
  Operand keys, values;
  float *parts, *y;
  int32_t* arrived;
  int heads, kv_heads, dim, capacity, splits, positions;
  float scale;
};

// One head by one warp: out[d] in shared memory.
__device__ inline void prepare_head(float* out, const float* x, const HeadForm& f,
                                    const AttentionArgs& a, int position, int lane) {
  const int d = a.dim;
  float r = 1;
  if (f.gain) {
    float squares = 0;
    for (int i = lane; i < d; i += 32) squares += __ldcg(x + i) * __ldcg(x + i);
    r = 1.0f / sqrtf(team_sum<32>(squares) / static_cast<float>(d) + f.eps);
  }
  const auto normed = [&](int i) { return f.gain ? __ldcg(x + i) * r * f.gain[i] : __ldcg(x + i); };
  float hi = -INFINITY, lo = -INFINITY;
  for (int i = lane; i < d; i += 32) {
    float v = normed(i);
    if (f.rotate) {
      const int half = d / 2, j = i < half ? i : i - half;
      const float c = a.cos[static_cast<int64_t>(position) * half + j],
                  s = a.sin[static_cast<int64_t>(position) * half + j];
      v = i < half ? v * c - normed(i + half) * s : v * c + normed(j) * s;
    }
    out[i] = v;
    hi = fmaxf(hi, v);
    lo = fmaxf(lo, -v);
  }
  if (!f.quantise) return;
  const RowGrid<float> g = row_grid(team_max<32>(hi), -team_max<32>(lo), f.s);
  const float top = static_cast<float>((1 << f.s.bits) - 1);
  for (int i = lane; i < d; i += 32) out[i] = (row_code(out[i], g, top) - g.zero) * g.scale;
}

// What a set of tokens gives: the largest score, Σ exp, and the weighted values of this lane.
template <int kEach> struct Sums {
  float top = -INFINITY, weight = 0, value[kEach] = {};
  __device__ void add(float score, float other_weight, const float (&v)[kEach]) {
    const float t = fmaxf(top, score);
    if (t == -INFINITY) return;
    const float keep = exp2_fast(top - t), in = exp2_fast(score - t);
    weight = weight * keep + other_weight * in;
#pragma unroll
    for (int j = 0; j < kEach; ++j) value[j] = value[j] * keep + v[j] * in;
    top = t;
  }
};

// The arguments of a stage. Throws Error when its tensors do not fit.
AttentionArgs attention_args(const DecodeAttentionStage& s);

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
  int last;
};

// All of the block's kWarps warps call it; a barrier must stand between two calls. T: of the cache.
template <class T, int kEach, int kWarps>
__device__ void attend(const AttentionArgs& a, AttentionMemory<kEach, kWarps>& m, int position,
                       int head, int split, int row) {
  constexpr int kTokens = kAttentionTokens;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int group = a.heads / a.kv_heads, kv = head / group, d = a.dim;
  const int tokens = position + 1;
  const SplitTokens of(tokens, a.splits);
  const int per = of.per, active = of.count;
  if (split >= active) return;
  const int begin = split * per, end = min(tokens, begin + per);
  const float* qkv = a.qkv + static_cast<int64_t>(row) * (a.heads + 2 * a.kv_heads) * d;
  const int64_t step = static_cast<int64_t>(a.kv_heads) * d;  // from token to token
  const int64_t first =
      static_cast<int64_t>(row) * a.capacity * step + static_cast<int64_t>(kv) * d;
  if (warp == 0) prepare_head(m.q, qkv + head * d, a.q, a, position, lane);
  if (end == tokens) {
    const float *k = qkv + (a.heads + kv) * d, *v = k + static_cast<int64_t>(a.kv_heads) * d;
    if (warp == 1) prepare_head(m.k_new, k, a.k, a, position, lane);
    if (warp == 2) prepare_head(m.v_new, v, a.v, a, position, lane);
    if (head % group == 0 && (warp == 1 || warp == 2)) {
      __syncwarp();
      for (int i = lane; i < d; i += 32)
        store(warp == 1 ? a.keys : a.values, first + position * step + i,
              warp == 1 ? m.k_new[i] : m.v_new[i]);
    }
  }
  __syncthreads();
  float mine[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) mine[j] = lane + 32 * j < d ? m.q[lane + 32 * j] * a.scale : 0.0f;
  Sums<kEach> sums;
  for (int t0 = begin + warp; t0 < end; t0 += kWarps * kTokens) {
    float k[kTokens][kEach], v[kTokens][kEach], score[kTokens];
    T k_raw[kTokens][kEach], v_raw[kTokens][kEach];  // all loads first, none behind a condition
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const int64_t at = first + min(t0 + u * kWarps, end - 1) * step;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int i = min(lane + 32 * j, d - 1);
        k_raw[u][j] = static_cast<const T*>(a.keys.data)[at + i];
        v_raw[u][j] = static_cast<const T*>(a.values.data)[at + i];
      }
    }
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const bool fresh = t0 + u * kWarps == position;  // its cache may not be written yet
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int i = min(lane + 32 * j, d - 1);
        const bool there = lane + 32 * j < d;
        k[u][j] = fresh ? m.k_new[i] : static_cast<float>(k_raw[u][j]);
        v[u][j] = !there ? 0.0f : fresh ? m.v_new[i] : static_cast<float>(v_raw[u][j]);
      }
    }
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      float s = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) s += mine[j] * k[u][j];
      score[u] = team_sum<32>(s);
    }
#pragma unroll
    for (int u = 0; u < kTokens; ++u)
      if (t0 + u * kWarps < end) sums.add(score[u], 1.0f, v[u]);
  }
  if (lane == 0) m.tops[warp] = sums.top, m.weights[warp] = sums.weight;
#pragma unroll
  for (int j = 0; j < kEach; ++j) m.values[warp][lane + 32 * j] = sums.value[j];
  __syncthreads();
  if (warp != 0) return;
  Sums<kEach> all;
  for (int w = 0; w < kWarps; ++w) {
    float v[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) v[j] = m.values[w][lane + 32 * j];
    all.add(m.tops[w], m.weights[w], v);
  }
  float* y = a.y + (static_cast<int64_t>(row) * a.heads + head) * d;
  if (active > 1) {
    const int64_t at = static_cast<int64_t>(row) * a.heads + head;
    float* parts = a.parts + at * a.splits * (d + 2);
    float* part = parts + static_cast<int64_t>(split) * (d + 2);
    if (lane == 0) part[d] = all.top, part[d + 1] = all.weight;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (lane + 32 * j < d) part[lane + 32 * j] = all.value[j];
    __threadfence();
    __syncwarp();
    if (lane == 0) m.last = atomicAdd(a.arrived + at, 1) == active - 1;
    __syncwarp();
    if (!m.last) return;
    __threadfence();
    all = {};
    for (int s = 0; s < active; ++s) {
      const float* p = parts + static_cast<int64_t>(s) * (d + 2);
      float v[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) v[j] = lane + 32 * j < d ? __ldcg(p + lane + 32 * j) : 0.0f;
      all.add(__ldcg(p + d), __ldcg(p + d + 1), v);
    }
    if (lane == 0) a.arrived[at] = 0;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (lane + 32 * j < d) y[lane + 32 * j] = all.value[j] / all.weight;
}

}  // namespace omq::cuda
