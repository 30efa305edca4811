// Rotary frequencies and tables.
#include "nn/rope.h"

#include <cmath>
#include <numbers>

#include "autograd/ops.h"

namespace omq::nn {

std::vector<double> rope_frequencies(int64_t head_dim, double theta, const RopeScaling& scaling,
                                     std::span<const float> divisors) {
  const int64_t half = head_dim / 2;
  check(divisors.empty() || static_cast<int64_t>(divisors.size()) == half,
        "rope: {} frequency divisors for a head of {}", divisors.size(), head_dim);
  std::vector<double> f(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    double& v = f[static_cast<size_t>(i)];
    v = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    if (!divisors.empty()) v /= static_cast<double>(divisors[static_cast<size_t>(i)]);
    if (scaling.type == RopeScaling::Type::Linear) v /= scaling.factor;
    if (scaling.type == RopeScaling::Type::Llama3) {
      // Long wavelengths are stretched by `factor`, short ones kept, those between blended.
      const double wavelength = 2.0 * std::numbers::pi / v,
                   original = scaling.original_max_positions;
      if (wavelength > original / scaling.low_freq_factor) {
        v /= scaling.factor;
      } else if (wavelength > original / scaling.high_freq_factor) {
        const double s = (original / wavelength - scaling.low_freq_factor) /
                         (scaling.high_freq_factor - scaling.low_freq_factor);
        v = (1.0 - s) * v / scaling.factor + s * v;
      }
    }
  }
  return f;
}

RopeTables rope_tables(std::span<const double> frequencies, int64_t positions, DType dtype) {
  const int64_t half = static_cast<int64_t>(frequencies.size());
  std::vector<double> c(static_cast<size_t>(positions * half)), s(c.size());
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(p) * frequencies[static_cast<size_t>(i)];
      c[static_cast<size_t>(p * half + i)] = std::cos(angle);
      s[static_cast<size_t>(p * half + i)] = std::sin(angle);
    }
  return {to(Tensor::from<double>(c, {positions, half}), dtype),
          to(Tensor::from<double>(s, {positions, half}), dtype)};
}

}  // namespace omq::nn
