// close(): two tensors agree up to rounding. bit_equal(): to the last bit.
//
// The measure is NMSE = Σ (got − want)² / Σ want², which does not care how large the values are; a
// bound of 1e-12 means about six good digits. A failing CHECK(close(…)) prints the NMSE, the worst
// element and both its values.
//
//   CHECK(close(attention(q, k, v, s), reference, 1e-12));
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "tensor/kernels.h"
#include "tensor/numeric.h"

namespace omq {

struct Closeness {
  bool ok = false;
  std::string what;  // for the log
  explicit operator bool() const { return ok; }
  friend std::ostream& operator<<(std::ostream& out, const Closeness& c) { return out << c.what; }
};

// x on the CPU, in another type; without history.
inline Tensor converted(const Tensor& x, DType dtype, Device device = {}) {
  Tensor dense = Tensor::empty(x.shape(), x.dtype(), x.device());
  on(x).copy(dense, x);
  Tensor host = dense;
  if (x.device().type != DeviceType::CPU) {
    host = Tensor::empty(x.shape(), x.dtype());
    device_api(x.device()).copy(host.raw(), Device{}, dense.raw(), x.device(), x.nbytes());
  }
  Tensor y = Tensor::empty(x.shape(), dtype);
  cpu::copy(y, host);
  if (device.type == DeviceType::CPU) return y;
  Tensor z = Tensor::empty(x.shape(), dtype, device);
  device_api(device).copy(z.raw(), device, y.raw(), Device{}, y.nbytes());
  return z;
}

inline std::vector<double> values(const Tensor& x) {
  return converted(x, DType::F64).to_vector<double>();
}

// Row-major index `at` of shape as "[1, 0, 7]".
inline std::string index_text(int64_t at, const Shape& shape) {
  Dims index = shape;
  for (int i = shape.n - 1; i >= 0; --i) {
    index[i] = at % shape[i];
    at /= shape[i];
  }
  return to_string(index);
}

inline Closeness close(const Tensor& got, const Tensor& want, double max_nmse) {
  if (!got.defined() || !want.defined()) return {false, "an undefined tensor"};
  if (got.shape() != want.shape())
    return {false, fmt::format("shape {} instead of {}", got.shape(), want.shape())};
  const std::vector<double> a = values(got), b = values(want);
  double error = 0, power = 0, worst = -1;
  size_t at = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    double d = std::abs(a[i] - b[i]);
    if (std::isnan(d))
      d = std::isnan(a[i]) && std::isnan(b[i]) ? 0 : std::numeric_limits<double>::infinity();
    if (a[i] == b[i]) d = 0;  // infinities
    error += d * d;
    if (std::isfinite(b[i])) power += b[i] * b[i];
    if (d > worst) worst = d, at = i;
  }
  if (a.empty()) return {true, "empty"};
  const double nmse = error == 0 ? 0 : error / std::max(power, std::numeric_limits<double>::min());
  return {nmse <= max_nmse,
          fmt::format("NMSE {:.3g} (bound {:.3g}), worst at {} of {}: {:.9g} instead of {:.9g}",
                      nmse, max_nmse, index_text(static_cast<int64_t>(at), got.shape()),
                      got.shape(), a[at], b[at])};
}

// Every element within `tolerance` of the other.
inline Closeness within(const Tensor& got, const Tensor& want, double tolerance) {
  if (got.shape() != want.shape())
    return {false, fmt::format("shape {} instead of {}", got.shape(), want.shape())};
  const std::vector<double> a = values(got), b = values(want);
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::abs(a[i] - b[i]) <= tolerance))
      return {false, fmt::format("at {} of {}: {:.9g} instead of {:.9g} (tolerance {:.3g})",
                                 index_text(static_cast<int64_t>(i), got.shape()), got.shape(),
                                 a[i], b[i], tolerance)};
  return {true, "within tolerance"};
}

// Same dtype, shape and bits (so NaN equals itself, and 0 is not −0).
inline Closeness bit_equal(const Tensor& got, const Tensor& want) {
  if (got.dtype() != want.dtype() || got.shape() != want.shape())
    return {false, fmt::format("{} {} instead of {} {}", dtype_name(got.dtype()), got.shape(),
                               dtype_name(want.dtype()), want.shape())};
  const Tensor a = converted(got, got.dtype()), b = converted(want, want.dtype());
  const size_t size = dtype_size(a.dtype());
  for (int64_t i = 0; i < a.numel(); ++i) {
    const size_t offset = static_cast<size_t>(i) * size;
    if (std::memcmp(static_cast<char*>(a.raw()) + offset, static_cast<char*>(b.raw()) + offset,
                    size) == 0)
      continue;
    const auto at = static_cast<size_t>(i);
    return {false, fmt::format("bits differ first at {} of {}: {:.17g} instead of {:.17g}",
                               index_text(i, a.shape()), a.shape(), values(a)[at], values(b)[at])};
  }
  return {true, "equal"};
}

}  // namespace omq
