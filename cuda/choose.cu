// The next token of greedy decoding, chosen where the logits are: the next step can begin before
// the host has read it.
//
// A block a sequence; the logits are read once from the L2 cache, where the head has just left
// them.
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

__global__ void __launch_bounds__(kThreads)
    choose_kernel(int32_t* state, int64_t* told, const float* logits, int count) {
  const int row = static_cast<int>(blockIdx.x), rows = static_cast<int>(gridDim.x);
  logits += static_cast<int64_t>(row) * count;
  Choice best{-INFINITY, 0};
  constexpr int kAtOnce = 8;
  for (int base = 0; base < count; base += kThreads * kAtOnce) {
    float v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * kThreads + static_cast<int>(threadIdx.x);
      v[j] = i < count ? __ldcg(logits + i) : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      best = Better{}(best, {v[j], base + j * kThreads + static_cast<int>(threadIdx.x)});
  }
  best = fold(best);
  if (threadIdx.x != 0) return;
  const bool broken = best.value != best.value;
  const int32_t at = state[rows + row];
  state[row] = broken ? 0 : best.id;
  state[rows + row] = at + 1;
  // One store of eight bytes: the host sees the token and its place together.
  const auto word = static_cast<int64_t>(static_cast<uint64_t>(at) << 32 |
                                         static_cast<uint32_t>(broken ? -1 : best.id));
  *reinterpret_cast<volatile int64_t*>(told + at % 2 * rows + row) = word;
  __threadfence_system();
}

}  // namespace

// ---- launchers ----

void choose(Tensor& state, Tensor& told, const Tensor& logits) {
  const int64_t rows = logits.dim(0), count = logits.dim(1);
  check(state.dtype() == DType::I32 && state.numel() == 2 * rows && told.dtype() == DType::U8 &&
            told.numel() == 16 * rows && logits.dtype() == DType::F32 && logits.is_contiguous() &&
            count <= INT32_MAX,
        "choose: state {}, told {}, logits {}", state.shape(), told.shape(), logits.shape());
  launch("choose", logits, choose_kernel, dim3(static_cast<unsigned>(rows)), kThreads, 0,
         state.data<int32_t>(), reinterpret_cast<int64_t*>(told.raw()), logits.data<float>(),
         static_cast<int>(count));
}

}  // namespace omq::cuda
