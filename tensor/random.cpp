// Ten rounds of multiply and mix.
#include "tensor/random.h"

#include <cmath>
#include <numbers>

namespace omq {
namespace {

constexpr uint32_t high(uint64_t x) { return static_cast<uint32_t>(x >> 32); }
constexpr uint32_t low(uint64_t x) { return static_cast<uint32_t>(x); }
constexpr uint64_t joined(uint32_t h, uint32_t l) { return uint64_t{h} << 32 | l; }

// The upper 53 bits as a number in (0, 1).
double open_unit(uint64_t x) { return (static_cast<double>(x >> 11) + 0.5) * 0x1p-53; }

}  // namespace

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> c, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c = {high(b) ^ c[1] ^ key[0], low(b), high(a) ^ c[3] ^ key[1], low(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return c;
}

std::array<uint32_t, 4> Philox::block(uint64_t index) const {
  return philox4x32({low(index), high(index), low(stream_), high(stream_)},
                    {low(seed_), high(seed_)});
}

uint64_t Philox::bits(uint64_t index) const {
  const auto b = block(index);
  return joined(b[1], b[0]);
}

double Philox::normal(uint64_t index) const {
  const auto b = block(index);
  const double u = open_unit(joined(b[1], b[0])), v = open_unit(joined(b[3], b[2]));
  return std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v);
}

}  // namespace omq
