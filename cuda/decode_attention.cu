// One new token of each sequence against its cache, from q, k, v as the products leave them:
// norms and rotation of the heads, their rounding where it is asked for, the new key and value into
// the cache, and attention over all that is cached, split along the tokens.
//
//   block   (query head, split, sequence), 8 warps; a warp takes every eighth token of the split
//   lane    as many neighbouring elements of a head as make 32 lanes of it
//
// The split that holds the newest token uses it from shared memory, so nobody waits for the cache.
// The splits of a head are joined in their order: in the shared memory of a cluster of blocks,
// where the device has that and eight are enough, else by the last block to arrive. Bytes: the
// cache once for each query head (from the L2 cache after the first of a group).
#include "cuda/decode_attention.cuh"

#include "cuda/packed.h"

namespace omq::cuda {
namespace {

HeadForm head_form(const Tensor& gain, double eps, bool rotate, const std::optional<RowQuant>& s) {
  HeadForm f;
  f.gain = gain.defined() ? gain.data<float>() : nullptr;
  f.eps = static_cast<float>(eps);
  f.rotate = rotate;
  f.quantise = s.has_value();
  if (s) f.s = *s;
  return f;
}

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Of the weights behind attention, asked for in the L2 cache while it runs: 0.4 % more tokens a
// second; three times as much gives nothing, six times takes up to 1.3 % (7B on an H200).
constexpr int64_t kAskedAhead = int64_t{2} << 20;

// kCluster: the splits of a head are a cluster.
template <class T, int kEach, bool kCluster>
__global__ void __launch_bounds__(kThreads)
    decode_attention_kernel(const __grid_constant__ AttentionArgs a) {
  __shared__ AttentionMemory<kEach, kWarps> memory;
  let_next_start();
  if constexpr (kCluster) cluster_arrive();
  const int head = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.y),
            row = static_cast<int>(blockIdx.z);
  if (a.next_each > 0 && threadIdx.x == kThreads - 1) {
    const auto block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    prefetch_to_l2(a.next + static_cast<size_t>(block) * a.next_each, a.next_each);
  }
  const int position = a.position[row];  // not written in a step before its last kernel
  if (position < 0 || position >= a.capacity || position >= a.positions) return;
  const int tokens = position + 1, per = split_tokens(a, tokens);
  const int begin = split * per, end = min(tokens, begin + per);
  Sums<1> mine;
  if (begin < end) mine = attend<T>(a, memory, position, head, begin, end, row);
  const int active = (tokens + per - 1) / per;  // splits that have tokens
  if constexpr (kCluster) return join_in_cluster(a, memory, mine, head, split, active, row);
  if (begin >= end) return;
  if (active == 1) return write_head(a, mine, head, row);
  join_by_arrival(a, memory, mine, head, split, active, row);
}

const Tensor& stored(const DecodeCache& c) { return c.floats.defined() ? c.floats : c.codes.codes; }

// Throws Error unless the cache is [rows, capacity, K, d] in a form that the kernel reads.
// on_grid: how new tokens are rounded.
CacheArgs cache_args(const DecodeAttentionStage& s, const DecodeCache& c,
                     const std::optional<RowQuant>& on_grid) {
  const Tensor& all = stored(c);
  const bool codes = !c.floats.defined();
  const int64_t width = codes ? c.codes.code_bytes() : s.head_dim;
  const Shape shape{s.qkv.dim(0), all.dim(1), s.kv_heads, width};
  check(all.shape() == shape && all.is_contiguous() &&
            all.dtype() == (codes ? DType::U8 : DType::F16),
        "decode attention: a cache {} of {}, {} wanted", all.shape(), dtype_name(all.dtype()),
        shape);
  if (!codes) return {all.raw(), nullptr};
  check(on_grid == c.codes.spec && c.codes.cols == s.head_dim && c.codes.grid.is_contiguous() &&
            c.codes.grid.numel() == all.numel() / width * 2,
        "decode attention: codes of {} bits on another grid than new ones", c.codes.spec.bits);
  return {all.raw(), reinterpret_cast<float2*>(c.codes.grid.data<float>())};
}

// Throws Error when the stage's tensors do not fit.
AttentionArgs attention_args(const DecodeAttentionStage& s) {
  const int64_t rows = s.qkv.dim(0);
  check(s.heads % s.kv_heads == 0 && s.head_dim <= 256 &&
            s.head_dim % decode_elements(s.head_dim) == 0,
        "decode attention: {} heads of {}, {} of keys", s.heads, s.head_dim, s.kv_heads);
  check(s.keys.floats.defined() == s.values.floats.defined() &&
            s.keys.codes.paired == s.values.codes.paired &&
            stored(s.keys).dim(1) == stored(s.values).dim(1),
        "decode attention: keys and values are stored differently");
  check(s.position.numel() == rows, "decode attention: positions {} for {} sequences",
        s.position.shape(), rows);
  AttentionArgs a{};
  a.qkv = s.qkv.data<float>();
  a.cos = s.cos.data<float>();
  a.sin = s.sin.data<float>();
  a.position = s.position.data<int32_t>();
  a.q = head_form(s.q_gain, s.q_eps, true, s.q);
  a.k = head_form(s.k_gain, s.k_eps, true, s.k);
  a.v = head_form({}, 0, false, s.v);
  a.keys = cache_args(s, s.keys, s.k);
  a.values = cache_args(s, s.values, s.v);
  a.parts = s.parts.data<float>();
  a.arrived = s.arrived.data<int32_t>();
  a.y = s.y.data<float>();
  if (s.prepared.defined()) {
    const int64_t columns = s.heads * s.head_dim;
    check(rows == 1 && s.head_dim % kScaleColumns == 0,
          "decode attention: heads of {} of {} rows cannot be left prepared", s.head_dim, rows);
    a.prepared = prepared_memory("decode attention", s.prepared, columns);
    a.padded = PreparedRow::padded(static_cast<int>(columns));
  }
  a.heads = static_cast<int>(s.heads);
  a.kv_heads = static_cast<int>(s.kv_heads);
  a.dim = static_cast<int>(s.head_dim);
  a.capacity = static_cast<int>(stored(s.keys).dim(1));
  a.splits = static_cast<int>(s.parts.dim(2));
  a.positions = static_cast<int>(s.cos.dim(0));
  a.group = a.heads / a.kv_heads;
  a.inverse_group = inverse_of(a.group);
  a.inverse_splits = inverse_of(a.splits);
  constexpr float kLog2E = 1.44269504088896341f;  // scores are exponents of two
  a.scale = kLog2E / sqrtf(static_cast<float>(a.dim));
  return a;
}

}  // namespace

// ---- launchers ----

void decode_attention(const DecodeAttentionStage& s) {
  AttentionArgs a = attention_args(s);
  const int64_t rows = s.qkv.dim(0);
  const dim3 grid(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.splits),
                  static_cast<unsigned>(rows));
  check(a.splits >= 1 && a.splits <= kMostSplits, "decode attention: {} splits of a head, 1 to {}",
        a.splits, kMostSplits);
  const bool cluster = a.splits > 1 && device_info(s.y.device().index).major >= 9;
  if (s.next.defined() && aligned16(s.next.raw())) {
    const int64_t bytes = std::min(static_cast<int64_t>(s.next.nbytes()), kAskedAhead);
    a.next = static_cast<const char*>(s.next.raw());
    a.next_each = static_cast<uint32_t>(bytes / (int64_t{grid.x} * grid.y * grid.z) / 16 * 16);
  }
  const auto run = [&](auto kernel) {
    prepare_shared(kernel, 0);
    launch_chained("decode_attention", s.y, kernel, grid, kThreads, 0, cluster ? a.splits : 1, a);
  };
  const auto of_each = [&](auto each) {
    constexpr int kEach = decltype(each)::value;
    const auto of_type = [&](auto type) {
      using T = decltype(type);
      cluster ? run(decode_attention_kernel<T, kEach, true>)
              : run(decode_attention_kernel<T, kEach, false>);
    };
    if (s.keys.floats.defined()) return of_type(__half{});
    s.keys.codes.paired ? of_type(Codes<2>{}) : of_type(Codes<1>{});
  };
  const int64_t each = decode_elements(a.dim);
  if (each == 2) return of_each(Int<2>{});
  if (each == 4) return of_each(Int<4>{});
  of_each(Int<8>{});
}

}  // namespace omq::cuda
