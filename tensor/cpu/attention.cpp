// Causal attention with grouped queries, tile by tile: kTile queries of one head against all keys
// they may see.
//
//   forward   S = scale · q kᵀ → P = softmax(S), kept as y = P v and lse = log Σ exp(S) per row
//   backward  P = exp(S − lse) is rebuilt per tile;  dv += Pᵀ dy,  dS = P ⊙ (dy vᵀ − Σ dy ⊙ y),  dq
//   = dS k,  dk += dSᵀ q
//
// Tiles are products of gemm_tile, of F32 or of bf16 with sums and everything between in F32 (other
// operands of 16 bits are widened first); a few queries (decoding) and F64 take plain loops. Every
// query head, where these are few every half of one's tiles, writes its own dk and dv; those of a
// key/value head are added in order, so nothing races and sums keep their order.
//
// Prompts, behind which there is no gradient, go the instruction set's own way where it has one.
#include <type_traits>
#include <vector>

#include "tensor/cpu/gemm.h"
#include "tensor/cpu/loops.h"
#include "tensor/cpu/packed_isa.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

constexpr int64_t kTile = 128;
constexpr int64_t kFewQueries = 8;  // below: dot products beat a matrix product
constexpr int64_t kFewHeads = 16;   // in all: below, threads cannot share them evenly

struct View {  // one head of [B, T, H, d]
  int64_t base, row;
};
View head(const Tensor& x, int64_t b, int64_t h) {
  return {b * x.stride(0) + h * x.stride(2), x.stride(1)};
}

struct Sizes {
  int64_t B, T, H, d, S, K, group;
  explicit Sizes(const Tensor& q, const Tensor& k)
      : B(q.dim(0)),
        T(q.dim(1)),
        H(q.dim(2)),
        d(q.dim(3)),
        S(k.dim(1)),
        K(k.dim(2)),
        group(H / K) {}
  // Keys that query t may see.
  int64_t visible(int64_t t, bool causal) const { return causal ? S - T + t + 1 : S; }
};

template <class T>
void plain_row(const T* q, const T* k, int64_t k_row, const T* v, int64_t v_row, int64_t n,
               int64_t d, T scale, T* p, T* y, T* lse) {
  for (int64_t s = 0; s < n; ++s) {
    const T* key = k + s * k_row;
    p[s] = scale * lane_sum<T>(d, [q, key](int64_t i) { return q[i] * key[i]; });
  }
  const T top = lane_max<T>(n, p[0], [p](int64_t i) { return p[i]; });
  for (int64_t s = 0; s < n; ++s) p[s] = exp_fast(p[s] - top);
  const T total = lane_sum<T>(n, [p](int64_t i) { return p[i]; });
  *lse = std::log(total) + top;
  std::fill_n(y, d, T(0));
  for (int64_t s = 0; s < n; ++s) {
    const T weight = p[s] / total;
    const T* value = v + s * v_row;
    for (int64_t i = 0; i < d; ++i) y[i] += weight * value[i];
  }
}

// A row of scores, of which n are seen, to probabilities times their sum, `out` [seen] (the row
// itself, or apart in the operands' type); gives log Σ exp and that sum. (Apart: inlined into the
// tile, GCC 12 did not vectorise its loops.)
struct Softmax {
  float lse, total;
};
template <class T>
[[gnu::noinline]] Softmax softmax_row(float* row, int64_t n, int64_t seen, float scale, T* out) {
  for (int64_t i = 0; i < n; ++i) row[i] *= scale;
  const float top = lane_max<float>(n, row[0], [row](int64_t i) { return row[i]; });
  for (int64_t i = 0; i < n; ++i) row[i] = exp_fast(row[i] - top);
  const float total = lane_sum<float>(n, [row](int64_t i) { return row[i]; });
  if constexpr (!std::is_same_v<T, float>)
    for (int64_t i = 0; i < n; ++i) out[i] = T(row[i]);
  std::fill(out + n, out + seen, T(0.0f));
  return {std::log(total) + top, total};
}

// Room for `count` values. (A vector that shrank between two tiles would fill with zeros what it
// grows by.)
template <class T> T* room(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}

// Where P and dS of a tile go that are multiplied: into the F32 scores themselves, or beside them.
template <class T> T* operand_tile(float* scores, int64_t count, std::vector<T>& apart) {
  if constexpr (std::is_same_v<T, float>)
    return scores;
  else
    return room(apart, count);
}

template <class T>
void attention_tile(const Sizes& z, const AttentionSpec& s, Tensor& y, Tensor& lse, const Tensor& q,
                    const Tensor& k, const Tensor& v, int64_t b, int64_t h, int64_t t0) {
  static thread_local std::vector<float> score_buffer;
  static thread_local std::vector<T> p_buffer;
  const int64_t rows = std::min(kTile, z.T - t0), seen = z.visible(t0 + rows - 1, s.causal);
  float* scores = room(score_buffer, rows * seen);
  T* p = operand_tile<T>(scores, rows * seen, p_buffer);
  const View qv = head(q, b, h), kv = head(k, b, h / z.group), vv = head(v, b, h / z.group),
             yv = head(y, b, h);
  gemm_tile(rows, seen, z.d, q.data<T>() + qv.base + t0 * qv.row, qv.row, 1, k.data<T>() + kv.base,
            1, kv.row, scores, seen);
  float* norm = lse.data<float>() + (b * z.H + h) * z.T + t0;
  float inverse[kTile];
  for (int64_t r = 0; r < rows; ++r) {
    const Softmax of = softmax_row(scores + r * seen, z.visible(t0 + r, s.causal), seen,
                                   static_cast<float>(s.scale), p + r * seen);
    norm[r] = of.lse;
    inverse[r] = 1.0f / of.total;
  }
  float* out = y.data<float>() + yv.base + t0 * yv.row;
  gemm_tile(rows, z.d, seen, p, seen, 1, v.data<T>() + vv.base, vv.row, 1, out, yv.row);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < z.d; ++i) out[r * yv.row + i] *= inverse[r];
}

template <class T>
void attention_rows(const Sizes& z, const AttentionSpec& s, Tensor& y, Tensor& lse, const Tensor& q,
                    const Tensor& k, const Tensor& v) {
  parallel_for(z.B * z.H, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> p(static_cast<size_t>(z.S));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / z.H, h = i % z.H;
      const View qv = head(q, b, h), kv = head(k, b, h / z.group), vv = head(v, b, h / z.group),
                 yv = head(y, b, h);
      for (int64_t t = 0; t < z.T; ++t)
        plain_row<T>(q.data<T>() + qv.base + t * qv.row, k.data<T>() + kv.base, kv.row,
                     v.data<T>() + vv.base, vv.row, z.visible(t, s.causal), z.d,
                     static_cast<T>(s.scale), p.data(), y.data<T>() + yv.base + t * yv.row,
                     lse.data<T>() + i * z.T + t);
    }
  });
}

struct HeadGrads {  // of one query head; dk and dv are the share of these tiles of it
  float *dq, *dk, *dv;
  View dqv;
};

// Which tiles of queries: all, or one of two halves that see as many keys as each other (of each
// four tiles the outer two, the inner two).
struct Tiles {
  int64_t halves, half;
  bool has(int64_t tile) const { return halves == 1 || ((tile + 1) / 2 % 2 == 0) == (half == 0); }
};

// A row's P and dS, of which n are seen, from its scores and dP = dy vᵀ.
struct RowGrads {
  float scale, lse, dot;  // dot: Σ dy ⊙ y
};
template <class T>
[[gnu::noinline]] void backward_row(float* scores, const float* dp, int64_t n, int64_t seen,
                                    RowGrads g, T* p, T* ds) {
  for (int64_t i = 0; i < n; ++i) scores[i] *= g.scale;  // rounded, as the forward's were
  for (int64_t i = 0; i < n; ++i) {
    const float pi = exp_fast(scores[i] - g.lse);
    ds[i] = T(pi * (dp[i] - g.dot) * g.scale);
    p[i] = T(pi);
  }
  std::fill(p + n, p + seen, T(0.0f));
  std::fill(ds + n, ds + seen, T(0.0f));
}

// dy of one head [T, d] in the operands' type.
template <class T>
const T* operand_grads(const Sizes& z, const float* dy, View& at, std::vector<T>& apart) {
  if constexpr (std::is_same_v<T, float>) {
    return dy + at.base;
  } else {
    T* out = room(apart, z.T * z.d);
    for (int64_t t = 0; t < z.T; ++t)
      for (int64_t i = 0; i < z.d; ++i) out[t * z.d + i] = T(dy[at.base + t * at.row + i]);
    at = {0, z.d};
    return out;
  }
}

// One head's gradient, or these tiles' share of it. dk, dv [S, d] dense; dq through its view.
template <class T>
void backward_head(const Sizes& z, const AttentionSpec& s, const HeadGrads& out, const Tensor& q,
                   const Tensor& k, const Tensor& v, const Tensor& y, const Tensor& lse,
                   const Tensor& dy, int64_t b, int64_t h, Tiles tiles) {
  static thread_local std::vector<float> score_buffer, dp_buffer;
  static thread_local std::vector<T> p_buffer, ds_buffer, grad_buffer;
  const View qv = head(q, b, h), kv = head(k, b, h / z.group), vv = head(v, b, h / z.group),
             yv = head(y, b, h), gv = head(dy, b, h);
  View ov = gv;
  const T *keys = k.data<T>() + kv.base, *values = v.data<T>() + vv.base,
          *grads = operand_grads<T>(z, dy.data<float>(), ov, grad_buffer);
  bool first = true;
  for (int64_t tile = (z.T - 1) / kTile; tile >= 0; --tile) {  // the first one sees the most keys
    if (!tiles.has(tile)) continue;
    const int64_t t0 = tile * kTile;
    const int64_t rows = std::min(kTile, z.T - t0), seen = z.visible(t0 + rows - 1, s.causal);
    float *scores = room(score_buffer, rows * seen), *dp = room(dp_buffer, rows * seen);
    T *p = operand_tile<T>(scores, rows * seen, p_buffer),
      *ds = operand_tile<T>(dp, rows * seen, ds_buffer);
    const T *queries = q.data<T>() + qv.base + t0 * qv.row, *grad = grads + t0 * ov.row;
    gemm_tile(rows, seen, z.d, queries, qv.row, 1, keys, 1, kv.row, scores, seen);
    gemm_tile(rows, seen, z.d, grad, ov.row, 1, values, 1, vv.row, dp, seen);
    const float* norm = lse.data<float>() + (b * z.H + h) * z.T + t0;
    for (int64_t r = 0; r < rows; ++r) {
      const float *yr = y.data<float>() + yv.base + (t0 + r) * yv.row,
                  *gr = dy.data<float>() + gv.base + (t0 + r) * gv.row;
      const float dot = lane_sum<float>(z.d, [yr, gr](int64_t i) { return yr[i] * gr[i]; });
      backward_row(scores + r * seen, dp + r * seen, z.visible(t0 + r, s.causal), seen,
                   {static_cast<float>(s.scale), norm[r], dot}, p + r * seen, ds + r * seen);
    }
    gemm_tile(seen, z.d, rows, p, 1, seen, grad, ov.row, 1, out.dv, z.d, !first);
    gemm_tile(seen, z.d, rows, ds, 1, seen, queries, qv.row, 1, out.dk, z.d, !first);
    gemm_tile(rows, z.d, seen, ds, seen, 1, keys, kv.row, 1, out.dq + t0 * out.dqv.row,
              out.dqv.row);
    if (first)
      for (float* grad_of : {out.dk, out.dv})
        std::fill_n(grad_of + seen * z.d, (z.S - seen) * z.d, 0.0f);
    first = false;
  }
}

// The definition, for gradient checks in F64.
void backward_head_f64(const Sizes& z, const AttentionSpec& s, double* dq, double* dk, double* dv,
                       View dqv, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y,
                       const Tensor& lse, const Tensor& dy, int64_t b, int64_t h) {
  const View qv = head(q, b, h), kv = head(k, b, h / z.group), vv = head(v, b, h / z.group),
             yv = head(y, b, h);
  const View gv = head(dy, b, h);
  std::fill_n(dk, z.S * z.d, 0.0);
  std::fill_n(dv, z.S * z.d, 0.0);
  for (int64_t t = 0; t < z.T; ++t) {
    const double* query = q.data<double>() + qv.base + t * qv.row;
    const double *out = y.data<double>() + yv.base + t * yv.row,
                 *grad = dy.data<double>() + gv.base + t * gv.row;
    double* dquery = dq + t * dqv.row;
    std::fill_n(dquery, z.d, 0.0);
    double dot = 0;
    for (int64_t i = 0; i < z.d; ++i) dot += out[i] * grad[i];
    for (int64_t n = 0; n < z.visible(t, s.causal); ++n) {
      const double *key = k.data<double>() + kv.base + n * kv.row,
                   *value = v.data<double>() + vv.base + n * vv.row;
      double score = 0, dp = 0;
      for (int64_t i = 0; i < z.d; ++i) score += query[i] * key[i], dp += grad[i] * value[i];
      const double p = std::exp(s.scale * score - lse.data<double>()[(b * z.H + h) * z.T + t]);
      const double ds = p * (dp - dot) * s.scale;
      for (int64_t i = 0; i < z.d; ++i) {
        dv[n * z.d + i] += p * grad[i];
        dk[n * z.d + i] += ds * query[i];
        dquery[i] += ds * key[i];
      }
    }
  }
}

// Operands of 16 bits for which there is no product of their own.
bool must_widen(const Tensor& q, int64_t queries) {
  const DType type = q.dtype();
  return type == DType::F16 || (type == DType::BF16 && (!gemm_has_bf16() || queries < kFewQueries));
}
Tensor widened(const Tensor& x) {
  Tensor y = Tensor::empty(x.shape(), DType::F32);
  copy(y, x);
  return y;
}

template <class T>
void attention_tiles(const Sizes& z, const AttentionSpec& s, Tensor& y, Tensor& lse,
                     const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t tiles = (z.T + kTile - 1) / kTile;
  parallel_for(z.B * z.H * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)  // the longest tiles first: they see the most keys
      attention_tile<T>(z, s, y, lse, q, k, v, i / (z.H * tiles), i % z.H,
                        (tiles - 1 - i / z.H % tiles) * kTile);
  });
}

// ---- prompts ----

constexpr int64_t kFewKeys = 64;                           // below: nothing to gain
constexpr int64_t kPreparedKeyBytes = 16ll * 1024 * 1024;  // at once, of at least one head

bool goes_own_way(const PackedIsa& isa, const Sizes& z, const AttentionSpec& s, const Tensor& q) {
  return !s.learns && s.scale > 0 && isa.attention_tile && q.dtype() == DType::F32 &&
         z.d % 32 == 0 && z.T >= kAttentionQueries && z.S >= kFewKeys;
}

// Memory of 64-byte lines, of a Tensor's pool.
struct Lines {
  Tensor memory;
  explicit Lines(int64_t bytes) : memory(Tensor::empty({bytes}, DType::U8)) {}
  std::byte* at(int64_t offset) const {
    return reinterpret_cast<std::byte*>(memory.data<uint8_t>()) + offset;
  }
};

void own_tile(const PackedIsa& isa, const Sizes& z, const AttentionSpec& s, Tensor& y, Tensor& lse,
              const Tensor& q, const AttentionKeys& keys, const std::byte* prepared, int64_t b,
              int64_t h, int64_t t0) {
  const Lines scratch(isa.attention_scratch_bytes(z.S, z.d));
  const View qv = head(q, b, h), yv = head(y, b, h);
  float top[kAttentionQueries], total[kAttentionQueries];
  const AttentionTile tile{.q = q.data<float>() + qv.base + t0 * qv.row,
                           .q_row = qv.row,
                           .rows = std::min(kAttentionQueries, z.T - t0),
                           .seen = z.visible(t0, s.causal),
                           .more = s.causal ? 1 : 0,
                           .scale = static_cast<float>(s.scale),
                           .y = y.data<float>() + yv.base + t0 * yv.row,
                           .y_row = yv.row,
                           .top = top,
                           .total = total};
  isa.attention_tile(tile, keys, prepared, scratch.at(0));
  float* norm = lse.data<float>() + (b * z.H + h) * z.T + t0;
  for (int64_t r = 0; r < tile.rows; ++r)
    norm[r] = std::log(total[r]) + top[r] * static_cast<float>(s.scale);
}

// Key/value heads some at a time: their keys are prepared, then all tiles of queries meet them.
void attention_own_way(const PackedIsa& isa, const Sizes& z, const AttentionSpec& s, Tensor& y,
                       Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t bytes = isa.attention_keys_bytes(z.S, z.d), heads = z.B * z.K;
  const int64_t at_once = std::clamp<int64_t>(kPreparedKeyBytes / bytes, 1, heads);
  const Lines prepared(at_once * bytes);
  const auto keys_of = [&](int64_t i) {
    const View kv = head(k, i / z.K, i % z.K), vv = head(v, i / z.K, i % z.K);
    return AttentionKeys{
        k.data<float>() + kv.base, v.data<float>() + vv.base, kv.row, vv.row, z.S, z.d};
  };
  constexpr int64_t kKeys = 32;
  const int64_t parts = (z.S + kKeys - 1) / kKeys;
  const int64_t tiles = (z.T + kAttentionQueries - 1) / kAttentionQueries;
  for (int64_t first = 0; first < heads; first += at_once) {
    const int64_t count = std::min(at_once, heads - first);
    parallel_for(count * parts, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        isa.prepare_attention_keys(keys_of(first + i / parts), i % parts * kKeys,
                                   std::min(z.S, (i % parts + 1) * kKeys),
                                   prepared.at(i / parts * bytes));
    });
    const int64_t queries = count * z.group;  // heads of queries
    parallel_for(queries * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {  // the longest tiles first: they see the most keys
        const int64_t which = i % queries / z.group, key_head = first + which;
        own_tile(isa, z, s, y, lse, q, keys_of(key_head), prepared.at(which * bytes),
                 key_head / z.K, key_head % z.K * z.group + i % z.group,
                 (tiles - 1 - i / queries) * kAttentionQueries);
      }
    });
  }
}

// Results of type T, operands of type Operand.
template <class T, class Operand>
void backward(const Sizes& z, Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor& y, const Tensor& lse, const Tensor& dy,
              AttentionSpec s) {
  const int64_t share = z.S * z.d;
  const bool halved = std::is_same_v<T, float> && z.B * z.H < kFewHeads && z.T > kTile;
  const int64_t parts = halved ? 2 : 1;
  Tensor dk_heads = Tensor::empty({z.B, z.H, parts, z.S, z.d}, dq.dtype()),
         dv_heads = empty_like(dk_heads);
  parallel_for(z.B * z.H * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (z.H * parts), h = i / parts % z.H;
      const View at = head(dq, b, h);
      T *hk = dk_heads.data<T>() + i * share, *hv = dv_heads.data<T>() + i * share;
      if constexpr (std::is_same_v<T, float>)
        backward_head<Operand>(z, s, {dq.data<float>() + at.base, hk, hv, at}, q, k, v, y, lse, dy,
                               b, h, {parts, i % parts});
      else
        backward_head_f64(z, s, dq.data<double>() + at.base, hk, hv, at, q, k, v, y, lse, dy, b, h);
    }
  });
  auto fold = [&](Tensor& out, const Tensor& shares) {  // [B, H, parts, S, d] → [B, S, K, d]
    T* o = out.data<T>();
    const T* p = shares.data<T>();
    const int64_t added = z.group * parts;
    parallel_for(
        z.B * z.S, std::max<int64_t>(1, kGrain / (z.H * z.d)), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r)
            for (int64_t kh = 0; kh < z.K; ++kh) {
              T* row = o + (r * z.K + kh) * z.d;
              std::fill_n(row, z.d, T(0));
              for (int64_t g = 0; g < added; ++g) {
                const T* part = p + (((r / z.S * z.K + kh) * added + g) * z.S + r % z.S) * z.d;
                for (int64_t i = 0; i < z.d; ++i) row[i] += part[i];
              }
            }
        });
  };
  fold(dk, dk_heads);
  fold(dv, dv_heads);
}

}  // namespace

void attention(Tensor& y, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
               AttentionSpec s) {
  const Sizes z(q, k);
  if (q.dtype() == DType::F64) return attention_rows<double>(z, s, y, lse, q, k, v);
  if (must_widen(q, z.T)) return attention(y, lse, widened(q), widened(k), widened(v), s);
  if (q.dtype() == DType::BF16) return attention_tiles<bf16_t>(z, s, y, lse, q, k, v);
  const PackedIsa& isa = active_packed_isa();
  if (goes_own_way(isa, z, s, q)) return attention_own_way(isa, z, s, y, lse, q, k, v);
  if (z.T < kFewQueries) return attention_rows<float>(z, s, y, lse, q, k, v);
  attention_tiles<float>(z, s, y, lse, q, k, v);
}

void attention_vjp(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& q, const Tensor& k,
                   const Tensor& v, const Tensor& y, const Tensor& lse, const Tensor& dy,
                   AttentionSpec s) {
  const Sizes z(q, k);
  if (q.dtype() == DType::F64)
    return backward<double, double>(z, dq, dk, dv, q, k, v, y, lse, dy, s);
  if (must_widen(q, z.T))
    return attention_vjp(dq, dk, dv, widened(q), widened(k), widened(v), y, lse, dy, s);
  if (q.dtype() == DType::BF16)
    return backward<float, bf16_t>(z, dq, dk, dv, q, k, v, y, lse, dy, s);
  backward<float, float>(z, dq, dk, dv, q, k, v, y, lse, dy, s);
}

}  // namespace omq::cpu
