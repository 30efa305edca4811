// Read bandwidth as the packed kernels use it: several sequential streams a thread, each prefetched
// ahead. One stream alone gets about two thirds of it.
#include "tensor/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "tensor/parallel.h"

namespace omq {

namespace {

constexpr int64_t kStreams = 8, kStreamBytes = 128 * 1024, kLine = 64, kAhead = 2048;
constexpr int64_t kChunk = kStreams * kStreamBytes;

// Touching one word of a line brings the whole line.
uint64_t read_chunk(const unsigned char* p) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < kStreamBytes; i += kLine)
    for (int64_t s = 0; s < kStreams; ++s) {
      const unsigned char* at = p + s * kStreamBytes + i;
      __builtin_prefetch(at + kAhead);
      uint64_t word;
      std::memcpy(&word, at, sizeof word);
      sum += word;
    }
  return sum;
}

}  // namespace

ReadBandwidth::ReadBandwidth(size_t bytes)
    : buffer_(std::max<size_t>(1, bytes / kChunk) * kChunk, 1) {}

double ReadBandwidth::pass() {
  std::atomic<uint64_t> total{0};  // keeps the loads from being dropped
  const auto start = std::chrono::steady_clock::now();
  parallel_for(static_cast<int64_t>(buffer_.size()), kChunk, [&](int64_t begin, int64_t) {
    total.fetch_add(read_chunk(buffer_.data() + begin), std::memory_order_relaxed);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return total.load() != 0 ? static_cast<double>(buffer_.size()) / seconds.count() : 0.0;
}

double measure_read_bandwidth(int threads) {
  const int before = num_threads();
  set_num_threads(threads);
  ReadBandwidth bench;
  std::vector<double> passes;
  bench.pass();
  for (int i = 0; i < 7; ++i) passes.push_back(bench.pass());
  set_num_threads(before);
  std::nth_element(passes.begin(), passes.begin() + 3, passes.end());
  return passes[3];
}

}  // namespace omq
