// Weights that a recorded step asks for in the L2 cache ahead of the kernels that read them, for
// memory is idle from the last weights of one product until the next one's begin: a kernel of its
// own beside all others of the recording, a warp to a processor, asks for some of a product's
// weights once the product in front has asked for the last of its own.
//
// Where each product asks for the next one's weights itself, it gains half as much, and loses where
// it asks for more or later: most likely a kernel ends once what it has asked for has come, and the
// next one waits for that end (docs/performance.md).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

namespace omq::cuda {

// Where a stage's kernel says that it has asked for all of its weights: it writes its number, from
// 1, to said. said null: nobody listens.
struct AheadMark {
  uint32_t* said = nullptr;
  uint32_t stage = 0;
};

// Memory that a stage reads.
struct AheadRange {
  const char* at = nullptr;
  int64_t bytes = 0;
};

// Of one recording. Its work is recorded twice: once to learn what its stages read, then beside the
// kernel that asks for it, which must be recorded in front of all others.
class WeightsAhead {
 public:
  static constexpr size_t kMostRanges = 6;  // of a stage: codes and grids of three matrices

  explicit WeightsAhead(int blocks) : blocks_(blocks) {}  // one for each processor
  ~WeightsAhead();
  WeightsAhead(const WeightsAhead&) = delete;
  WeightsAhead& operator=(const WeightsAhead&) = delete;

  // For a stage that is recorded next, and what the stage behind it reads, of which as many ranges
  // count as there is room for. Its kernel leaves a warp of 16 registers a thread room on each
  // processor.
  AheadMark add(std::span<const AheadRange> behind);
  // A kernel is recorded next that leaves no such room: nobody listens to stages behind it.
  void close() { closed_ = true; }

  bool has_stages() const { return !shares_.empty(); }
  // In front of all that the second recording records on `stream`, and behind it. It may be
  // replayed while *this lives.
  void begin(cudaStream_t stream);
  void end(cudaStream_t stream);

  struct Share {  // block b asks for `each` bytes from at + b · stride on
    const char* at = nullptr;
    uint32_t stride = 0, each = 0;
  };

 private:
  int blocks_;
  bool closed_ = false;
  uint32_t added_ = 0;         // stages of the recording under way
  std::vector<Share> shares_;  // [stages, kMostRanges]
  Share* there_ = nullptr;     // the same on the device
  uint32_t* said_ = nullptr;   // on the device
  cudaStream_t beside_ = nullptr;
  cudaEvent_t begun_ = nullptr, ended_ = nullptr;
};

// Of the recording under way on the device; null: there is none, or its device cannot. (device.cpp)
WeightsAhead* weights_ahead(int device);

}  // namespace omq::cuda
