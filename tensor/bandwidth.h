// How fast this machine reads memory: the ceiling of decoding, which benchmarks give their figures
// a percentage of.
#pragma once

#include <cstddef>
#include <vector>

namespace omq {

// Reads a buffer larger than the caches, pass by pass, on parallel_for's threads. Machines shared
// with others drift by the minute: take passes in turn with what is compared to them.
class ReadBandwidth {
 public:
  explicit ReadBandwidth(size_t bytes = size_t{256} << 20);
  // Bytes per second of one pass over the buffer.
  double pass();

 private:
  std::vector<unsigned char> buffer_;
};

// Median of a few passes on this many threads, bytes per second. Takes about a quarter of a second.
double measure_read_bandwidth(int threads);

}  // namespace omq
