// The counter generator: the numbers that its authors publish, and what is made of them.
#include "tensor/random.h"

#include <doctest/doctest.h>

#include <cmath>
#include <set>
#include <vector>

namespace omq {

// kat_vectors of the Random123 library.
TEST_CASE("random: Philox gives the published numbers") {
  using Counter = std::array<uint32_t, 4>;
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) ==
        Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  const uint32_t ones = 0xffffffff;
  CHECK(philox4x32({ones, ones, ones, ones}, {ones, ones}) ==
        Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("random: seeds, streams and indices all count, over their whole width") {
  std::set<uint64_t> seen;
  const uint64_t far = uint64_t{1} << 40;
  for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, far})
    for (const uint64_t stream : {uint64_t{0}, uint64_t{1}, far})
      for (const uint64_t index : {uint64_t{0}, uint64_t{1}, far})
        seen.insert(Philox(seed, stream).bits(index));
  CHECK(seen.size() == 27);
  CHECK(Philox(7, 3).bits(5) == Philox(7, 3).bits(5));
}

TEST_CASE("random: normal numbers and signs have the moments that they should") {
  const Philox random(2);
  constexpr int kCount = 20000;
  double mean = 0, square = 0, fourth = 0, signs = 0;
  for (uint64_t i = 0; i < kCount; ++i) {
    const double x = random.normal(i);
    mean += x / kCount, square += x * x / kCount, fourth += x * x * x * x / kCount;
    signs += random.sign(i) / kCount;
  }
  // About four deviations of each mean: 1, √2, √96 and 1, over √20000.
  CHECK(std::abs(mean) < 0.03);
  CHECK(std::abs(square - 1) < 0.04);
  CHECK(std::abs(fourth - 3) < 0.3);
  CHECK(std::abs(signs) < 0.03);
}

}  // namespace omq
