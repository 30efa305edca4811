// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random
// numbers as a function of seed, stream and index, so that they are the same on every device, in
// any order, on any number of threads.
#pragma once

#include <array>
#include <cstdint>

namespace omq {

// The generator's own function: 128 bits from a counter and a key.
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// Streams of one seed are independent, and so are the numbers of one stream.
class Philox {
 public:
  explicit Philox(uint64_t seed, uint64_t stream = 0) : seed_(seed), stream_(stream) {}
  uint64_t bits(uint64_t index) const;
  double sign(uint64_t index) const { return bits(index) & 1 ? 1 : -1; }
  double normal(uint64_t index) const;  // mean 0, deviation 1, by Box and Muller's formula

 private:
  std::array<uint32_t, 4> block(uint64_t index) const;
  uint64_t seed_, stream_;
};

}  // namespace omq
