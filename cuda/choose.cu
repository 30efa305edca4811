// The next token, chosen where the logits are: the next step can begin before the host has read it.
//
// A block a sequence. Greedy: the logits are read once from the L2 cache, where the head has just
// left them. Drawn: twice. The top_k-th largest of the maxima of kGroups groups of tokens is a
// bound that top_k logits reach and few others do; those that reach it are sorted, and one warp
// goes through the chain of models/sampler.h with them, in double as it is there.
#include "cuda/common.cuh"
#include "cuda/packed.h"

namespace omq::cuda {
namespace {

constexpr int kThreads = 1024;

struct Choice {
  float value;
  int32_t id;
};
// The larger value, the lower id among equals. NaN wins, so that it is seen.
struct Better {
  __device__ Choice operator()(Choice a, Choice b) const {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan || b_nan) return a_nan ? a : b;
    if (a.value == b.value) return a.id < b.id ? a : b;
    return a.value > b.value ? a : b;
  }
};

__device__ Choice fold(Choice v) {
  __shared__ float values[kThreads / 32];
  __shared__ int32_t ids[kThreads / 32];
  const auto warp = [](Choice c) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
      c = Better{}(
          c, {__shfl_xor_sync(0xffffffffu, c.value, d), __shfl_xor_sync(0xffffffffu, c.id, d)});
    return c;
  };
  v = warp(v);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) values[threadIdx.x / 32] = v.value, ids[threadIdx.x / 32] = v.id;
  __syncthreads();
  return warp({values[lane], ids[lane]});
}

// body(i, logits[i]) of a thread's share of a row.
template <class F> __device__ void each_logit(const float* logits, int count, F&& body) {
  constexpr int kAtOnce = 8;
#pragma unroll 1
  for (int base = static_cast<int>(threadIdx.x); base < count; base += kThreads * kAtOnce) {
    float v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) v[j] = __ldcg(logits + min(base + j * kThreads, count - 1));
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (const int i = base + j * kThreads; i < count) body(i, v[j]);
  }
}

// state, told: of the row, whose next ones lie `rows` further on.
__device__ void tell(int32_t* state, int64_t* told, int rows, int32_t id) {
  const int32_t at = state[rows];
  state[0] = max(id, 0);
  state[rows] = at + 1;
  // One store of eight bytes: the host sees the token and its place together.
  const auto word =
      static_cast<int64_t>(static_cast<uint64_t>(at) << 32 | static_cast<uint32_t>(id));
  *reinterpret_cast<volatile int64_t*>(told + at % 2 * rows) = word;
  __threadfence_system();
}

__global__ void __launch_bounds__(kThreads)
    choose_kernel(int32_t* state, int64_t* told, const float* logits, int count) {
  const int row = static_cast<int>(blockIdx.x), rows = static_cast<int>(gridDim.x);
  Choice best{-INFINITY, 0};
  each_logit(logits + static_cast<int64_t>(row) * count, count, [&](int i, float v) {
    best = Better{}(best, {v, i});
  });
  best = fold(best);
  if (threadIdx.x == 0)
    tell(state + row, told + row, rows, best.value != best.value ? kChosenNaN : best.id);
}

// ---- drawing ----

constexpr int kTop = static_cast<int>(kDecodeMostTopK), kGroups = 256, kCandidates = 1024;
static_assert(kTop <= kGroups && kTop % 32 == 0 && kCandidates <= kThreads &&
              kThreads % kGroups == 0);

// A logit and its token as one number: the larger logit is the larger one, the lower id among
// equals. 0 is less than all of them.
__device__ uint64_t key_of(float logit, int id) {
  const auto bits = static_cast<uint32_t>(__float_as_int(logit == 0.0f ? 0.0f : logit));
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(id);
}
__device__ float logit_of(uint64_t key) {
  const auto ordered = static_cast<uint32_t>(key >> 32);
  return __int_as_float(static_cast<int>(ordered >> 31 ? ordered ^ 0x80000000u : ~ordered));
}
__device__ int32_t id_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

struct DrawArgs {
  int32_t* state;
  int64_t* told;
  float* logits;
  int count;
  const int32_t* bias_ids;
  const float* bias;
  int biases;
  const double* numbers;  // [rows, positions]
  int positions;
  int top_k;
  double top_p, min_p, temperature;
};

struct DrawMemory {  // shared
  uint64_t maxima[kGroups], candidates[kCandidates], sorted[kTop];
  uint64_t bound;
  int found;
};

// Tokens of a row whose key is at least `bound`, counted by the block.
__device__ int count_reaching(DrawMemory& m, const float* logits, int count, uint64_t bound) {
  __syncthreads();
  if (threadIdx.x == 0) m.found = 0;
  __syncthreads();
  int mine = 0;
  each_logit(logits, count, [&](int i, float v) { mine += key_of(v, i) >= bound; });
  mine = team_sum<32>(mine);
  if (threadIdx.x % 32 == 0) atomicAdd(&m.found, mine);
  __syncthreads();
  return m.found;
}

// A bound that at least k keys of the row reach, and few more where the largest are spread over the
// groups; 0 where there are fewer than k groups. max: of this thread's keys.
__device__ uint64_t bound_of(DrawMemory& m, int k, uint64_t max) {
  constexpr int kEach = kThreads / kGroups;  // neighbouring threads, and parts of a comparison
  const int group = static_cast<int>(threadIdx.x) / kEach,
            part = static_cast<int>(threadIdx.x) % kEach;
#pragma unroll
  for (int d = 1; d < kEach; d *= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, max, d);
    max = other > max ? other : max;
  }
  if (part == 0) m.maxima[group] = max;
  if (threadIdx.x == 0) m.bound = 0;
  __syncthreads();
  int above = 0;
  for (int i = part; i < kGroups; i += kEach) above += m.maxima[i] > max;
#pragma unroll
  for (int d = 1; d < kEach; d *= 2) above += __shfl_xor_sync(0xffffffffu, above, d);
  if (above == k - 1 && part == 0 && max > 0) m.bound = max;  // one group's: keys differ
  __syncthreads();
  return m.bound;
}

// Writes the keys that reach the bound, in any order, as far as there is room; gives their number.
__device__ int collect(DrawMemory& m, const float* logits, int count, uint64_t bound) {
  __syncthreads();
  if (threadIdx.x == 0) m.found = 0;
  __syncthreads();
  each_logit(logits, count, [&](int i, float v) {
    const uint64_t key = key_of(v, i);
    if (key < bound) return;
    if (const int at = atomicAdd(&m.found, 1); at < kCandidates) m.candidates[at] = key;
  });
  __syncthreads();
  return m.found;
}

// A bound that at least k keys reach and at most kCandidates, found by halves: for rows whose
// largest logits crowd into few groups, or are all equal.
__device__ uint64_t raised_bound(DrawMemory& m, const float* logits, int count, int k,
                                 uint64_t bound) {
  uint64_t low = bound, high = ~uint64_t{0};  // k keys reach low, fewer than k reach high
  for (int reached = kCandidates + 1; reached > kCandidates;) {
    const uint64_t middle = low + (high - low) / 2;
    const int n = count_reaching(m, logits, count, middle);
    if (n >= k)
      low = middle, reached = n;
    else
      high = middle;
  }
  return low;
}

__device__ double warp_sum_to(double v, int lane) {  // of this lane and those before it
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const double before = __shfl_up_sync(0xffffffffu, v, d);
    if (lane >= d) v += before;
  }
  return v;
}

// The chain behind top-k, by one warp: which of the n sorted logits is drawn. A lane has kTop / 32
// neighbours.
__device__ int draw(const uint64_t* sorted, int n, const DrawArgs& a, double number) {
  constexpr int kEach = kTop / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, first = lane * kEach;
  double logit[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    logit[j] = first + j < n ? static_cast<double>(logit_of(sorted[first + j])) : -INFINITY;
  const double largest = __shfl_sync(0xffffffffu, logit[0], 0);
  // The first place of the n at which `reached(sum of the weights to there, of all)`, else n − 1.
  const auto first_place = [&](double temperature, auto&& reached) {
    double upto[kEach], sum = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      upto[j] = sum += first + j < n ? exp((logit[j] - largest) / temperature) : 0.0;
    const double end = warp_sum_to(sum, lane), all = __shfl_sync(0xffffffffu, end, 31);
    int place = n - 1;
#pragma unroll
    for (int j = kEach - 1; j >= 0; --j)
      if (first + j < n && reached(end - sum + upto[j], all)) place = min(place, first + j);
    return -team_max<32>(-place);
  };
  if (a.top_p < 1.0)
    n = 1 + first_place(1.0, [&](double upto, double all) { return upto >= a.top_p * all; });
  if (a.min_p > 0.0) {
    const double least = largest + log(a.min_p);
    int kept = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) kept += first + j < n && logit[j] >= least;
    n = max(1, team_sum<32>(kept));
  }
  return first_place(a.temperature, [&](double upto, double all) { return upto > number * all; });
}

__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ DrawArgs a) {
  __shared__ DrawMemory m;
  const int row = static_cast<int>(blockIdx.x), rows = static_cast<int>(gridDim.x);
  const int t = static_cast<int>(threadIdx.x), k = min(a.top_k, a.count);
  float* logits = a.logits + static_cast<int64_t>(row) * a.count;
  for (int i = t; i < a.biases; i += kThreads) logits[a.bias_ids[i]] += a.bias[i];  // ids differ
  __syncthreads();
  uint64_t max = 0;
  bool broken = false;
  each_logit(logits, a.count, [&](int i, float v) {
    broken |= v != v;
    const uint64_t key = key_of(v, i);
    max = key > max ? key : max;
  });
  if (__syncthreads_or(broken)) {
    if (t == 0) tell(a.state + row, a.told + row, rows, kChosenNaN);
    return;
  }
  const uint64_t bound = bound_of(m, k, max);
  int found = collect(m, logits, a.count, bound);
  if (found > kCandidates)
    found = collect(m, logits, a.count, raised_bound(m, logits, a.count, k, bound));
  if (t < found) {
    const uint64_t key = m.candidates[t];
    int above = 0;
    for (int i = 0; i < found; ++i) above += m.candidates[i] > key;
    if (above < k) m.sorted[above] = key;
  }
  __syncthreads();
  if (t >= 32) return;
  int n = 0;  // what is forbidden stands last
  for (int i = t; i < k; i += 32) n += logit_of(m.sorted[i]) > -INFINITY;
  n = team_sum<32>(n);
  if (n == 0) {
    if (t == 0) tell(a.state + row, a.told + row, rows, kChosenNothing);
    return;
  }
  const int at = min(a.state[rows + row], a.positions - 1);
  const int place = draw(m.sorted, n, a, a.numbers[static_cast<int64_t>(row) * a.positions + at]);
  if (t == 0) tell(a.state + row, a.told + row, rows, id_of(m.sorted[place]));
}

}  // namespace

// ---- launchers ----

void choose(Tensor& state, Tensor& told, Tensor& logits, const TokenChoice& by) {
  const int64_t rows = logits.dim(0), count = logits.dim(1);
  check(state.dtype() == DType::I32 && state.numel() == 2 * rows && told.dtype() == DType::U8 &&
            told.numel() == 16 * rows && logits.dtype() == DType::F32 && logits.is_contiguous() &&
            count > 0 && count <= INT32_MAX,
        "choose: state {}, told {}, logits {}", state.shape(), told.shape(), logits.shape());
  const dim3 grid(static_cast<unsigned>(rows));
  auto* words = reinterpret_cast<int64_t*>(told.raw());
  if (by.takes_largest())
    return launch("choose", logits, choose_kernel, grid, kThreads, 0, state.data<int32_t>(), words,
                  static_cast<const float*>(logits.data<float>()), static_cast<int>(count));
  check(by.top_k >= 1 && by.top_k <= kTop && by.temperature > 0 && by.numbers.ndim() == 2 &&
            by.numbers.dim(0) == rows && by.numbers.dim(1) > 0 &&
            by.bias.numel() == by.bias_ids.numel(),
        "choose: top-k {}, temperature {}, numbers {}, bias {} of {} ids", by.top_k, by.temperature,
        by.numbers.shape(), by.bias.shape(), by.bias_ids.shape());
  const bool biased = by.bias.defined();
  const DrawArgs a{.state = state.data<int32_t>(),
                   .told = words,
                   .logits = logits.data<float>(),
                   .count = static_cast<int>(count),
                   .bias_ids = biased ? by.bias_ids.data<int32_t>() : nullptr,
                   .bias = biased ? by.bias.data<float>() : nullptr,
                   .biases = biased ? static_cast<int>(by.bias.numel()) : 0,
                   .numbers = by.numbers.data<double>(),
                   .positions = static_cast<int>(by.numbers.dim(1)),
                   .top_k = static_cast<int>(by.top_k),
                   .top_p = by.top_p,
                   .min_p = by.min_p,
                   .temperature = by.temperature};
  launch("choose", logits, draw_kernel, grid, kThreads, 0, a);
}

}  // namespace omq::cuda
