// Random inputs from a seed, and for_all(), which runs a property on many of them and names the
// seed that breaks it.
//
//   for_all(50, [](Rng& r) { return random_tensor(r, {r.between(1, 9), 4}); }, [](const Tensor& x)
//   { CHECK(…); });
//
// OMQ_SEED=n in the environment runs case n alone.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <numbers>
#include <random>
#include <type_traits>
#include <vector>

#include "tests/support/close.h"

namespace omq {

// The standard's distributions differ between libraries, its generators do not: the same seed gives
// the same numbers everywhere.
class Rng {
 public:
  explicit Rng(uint64_t seed) : bits_(seed * 0x9e3779b97f4a7c15u + 1) {}

  int64_t between(int64_t lo, int64_t hi) {  // lo … hi, both included
    return lo + static_cast<int64_t>(bits_() % static_cast<uint64_t>(hi - lo + 1));
  }
  double uniform(double lo, double hi) {
    return lo + (hi - lo) * static_cast<double>(bits_() >> 11) * 0x1p-53;
  }
  double normal() {
    return std::sqrt(-2 * std::log(uniform(1e-12, 1))) *
           std::cos(2 * std::numbers::pi * uniform(0, 1));
  }
  bool coin() { return bits_() & 1; }

 private:
  std::mt19937_64 bits_;
};

inline Tensor random_tensor(Rng& rng, Shape shape, DType dtype = DType::F64, double lo = -1,
                            double hi = 1) {
  std::vector<double> v(static_cast<size_t>(shape.product()));
  for (double& x : v) x = rng.uniform(lo, hi);
  return converted(Tensor::from<double>(v, shape), dtype);
}

inline Tensor normal_tensor(Rng& rng, Shape shape, DType dtype = DType::F64, double deviation = 1) {
  std::vector<double> v(static_cast<size_t>(shape.product()));
  for (double& x : v) x = deviation * rng.normal();
  return converted(Tensor::from<double>(v, shape), dtype);
}

inline Tensor random_ids(Rng& rng, Shape shape, int64_t count, Device device = {}) {
  std::vector<int32_t> v(static_cast<size_t>(shape.product()));
  for (int32_t& x : v) x = static_cast<int32_t>(rng.between(0, count - 1));
  return Tensor::from<int32_t>(v, shape, device);
}

// property: void (with CHECKs inside), or anything that CHECK takes.
template <class Gen, class Property> void for_all(int n, Gen&& gen, Property&& property) {
  const char* only = std::getenv("OMQ_SEED");
  for (int i = 0; i < n; ++i) {
    const uint64_t seed = only ? std::strtoull(only, nullptr, 10) : static_cast<uint64_t>(i);
    INFO("failing case: run again with OMQ_SEED=" << seed);
    Rng rng(seed);
    if constexpr (std::is_void_v<decltype(property(gen(rng)))>)
      property(gen(rng));
    else
      CHECK(property(gen(rng)));
    if (only) return;
  }
}

}  // namespace omq
