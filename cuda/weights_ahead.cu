#include "cuda/weights_ahead.h"

#include "cuda/packed_kernels.cuh"

namespace omq::cuda {
namespace {

// Of a stage's weights, in bytes: twice as much delays what is multiplied in front of it (H200).
constexpr int64_t kAskedOfStage = int64_t{5} << 19;
// Nobody says anything for so long where a kernel cannot run beside this one.
constexpr uint64_t kPatience = 200'000;  // ns

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// A warp a block. No result depends on it.
__global__ void ask_ahead_kernel(const WeightsAhead::Share* shares, uint32_t stages,
                                 const volatile uint32_t* said) {
  uint64_t since = nanoseconds();
  for (uint32_t stage = 1; stage <= stages; ++stage, shares += WeightsAhead::kMostRanges) {
    WeightsAhead::Share mine;
    if (threadIdx.x < WeightsAhead::kMostRanges) mine = shares[threadIdx.x];
    uint32_t now;
    while ((now = *said) < stage)
      if (nanoseconds() - since > kPatience) return;
    since = nanoseconds();
    // Not what is being read by now.
    if (now == stage && mine.each > 0)
      prefetch_to_l2(mine.at + uint64_t{blockIdx.x} * mine.stride, mine.each);
  }
}

}  // namespace

WeightsAhead::~WeightsAhead() {
  if (beside_) cudaStreamDestroy(beside_);
  for (cudaEvent_t event : {begun_, ended_})
    if (event) cudaEventDestroy(event);
  if (said_) cudaFree(said_);
  if (there_) cudaFree(there_);
  cudaGetLastError();
}

AheadMark WeightsAhead::add(std::span<const AheadRange> behind) {
  if (closed_ || behind.empty()) return {};
  if (said_) return {said_, ++added_};
  int64_t all = 0;
  for (const AheadRange& r : behind) all += r.bytes;
  for (size_t i = 0; i < kMostRanges; ++i) {
    Share& share = shares_.emplace_back();
    if (i >= behind.size()) continue;
    // Evenly over the range, since the stage's warps begin everywhere in it. Lines of the cache,
    // and sectors.
    const int64_t stride = behind[i].bytes / blocks_ / 128 * 128,
                  each = all > kAskedOfStage ? stride * kAskedOfStage / all / 32 * 32 : stride;
    share = {behind[i].at, static_cast<uint32_t>(stride), static_cast<uint32_t>(each)};
  }
  return {};
}

void WeightsAhead::begin(cudaStream_t stream) {
  closed_ = false;
  const size_t bytes = shares_.size() * sizeof(Share);
  OMQ_CUDA(cudaMalloc(&said_, sizeof *said_));
  OMQ_CUDA(cudaMalloc(&there_, bytes));
  OMQ_CUDA(cudaMemcpy(there_, shares_.data(), bytes, cudaMemcpyHostToDevice));
  OMQ_CUDA(cudaStreamCreateWithFlags(&beside_, cudaStreamNonBlocking));
  for (cudaEvent_t* event : {&begun_, &ended_})
    OMQ_CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  // One beginning for both sides: with two, or with this kernel recorded later, a token of 7B's
  // shape takes 7 to 15 % longer (CUDA 13, H200).
  OMQ_CUDA(cudaMemsetAsync(said_, 0, sizeof *said_, stream));
  OMQ_CUDA(cudaEventRecord(begun_, stream));
  OMQ_CUDA(cudaStreamWaitEvent(beside_, begun_, 0));
  prepare_shared(ask_ahead_kernel, 0);  // divided as the others have it, or it shares no processor
  ask_ahead_kernel<<<static_cast<unsigned>(blocks_), 32, 0, beside_>>>(
      there_, static_cast<uint32_t>(shares_.size() / kMostRanges), said_);
  check_launch("ask_ahead", beside_);
  OMQ_CUDA(cudaEventRecord(ended_, beside_));
}

void WeightsAhead::end(cudaStream_t stream) { OMQ_CUDA(cudaStreamWaitEvent(stream, ended_, 0)); }

}  // namespace omq::cuda
