// compare(): one kernel on a device's strided, broadcast or unaligned views against the CPU's on
// dense inputs, with guard bytes around every output and the same bits on every run. on_devices()
// makes random cases for every device present.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "tensor/kernels.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq {

using Tensors = std::vector<Tensor>;

// The same values twice: dense on the CPU, and laid out in some way on the device under test.
struct Input {
  Tensor dense, view;
};
enum class Layout { Dense, Shifted, Strided };  // Shifted: contiguous, but unaligned

inline Tensor uploaded(const Tensor& host, Device d) {
  Tensor y = Tensor::empty(host.shape(), host.dtype(), d);
  if (host.numel() > 0) device_api(d).copy(y.raw(), d, host.raw(), Device{}, host.nbytes());
  return y;
}

// A view of `values` (dense, on the CPU) in memory of d.
inline Input laid_out(Rng& rng, const Tensor& values, Device d, Layout layout) {
  const Shape& shape = values.shape();
  Strides strides = contiguous_strides(shape);
  int64_t offset = 0, room = values.numel();
  if (layout == Layout::Shifted) {
    offset = rng.between(1, 3);
    room += offset;
  } else if (layout == Layout::Strided) {  // dims in random order, each with some padding
    std::vector<int> order;
    for (int i = 0; i < shape.n; ++i)
      order.insert(order.begin() + rng.between(0, static_cast<int64_t>(order.size())), i);
    int64_t step = rng.coin() ? 1 : rng.between(1, 3);
    for (int i : order) {
      strides[i] = step;
      step *= shape[i] + (rng.coin() ? 0 : rng.between(0, 8));
    }
    offset = rng.coin() ? 0 : rng.between(0, 8);
    room = step + offset;
  }
  Tensor base = Tensor::zeros({room}, values.dtype());
  Tensor host = base.alias(shape, strides, offset);
  cpu::copy(host, values);
  return {values, uploaded(base, d).alias(shape, strides, offset)};
}

inline Input random_input(Rng& rng, Shape shape, Device d, Layout layout = Layout::Dense,
                          DType dtype = DType::F32, double lo = -2, double hi = 2) {
  return laid_out(rng, random_tensor(rng, shape, dtype, lo, hi), d, layout);
}
inline Layout dense_or_shifted(Rng& rng) {
  return rng.between(0, 3) == 0 ? Layout::Shifted : Layout::Dense;
}
inline Layout any_layout(Rng& rng) { return static_cast<Layout>(rng.between(0, 2)); }

// A dense tensor in the middle of bytes that nobody may touch.
class Guarded {
 public:
  Guarded(const Shape& shape, DType dtype, Device d) : device_(d) {
    bytes_ = static_cast<size_t>(shape.product()) * dtype_size(dtype);
    storage_ = Storage::allocate(bytes_ + 2 * kGuard, d);
    const std::vector<uint8_t> pattern(bytes_ + 2 * kGuard, kByte);
    device_api(d).copy(storage_->data(), d, pattern.data(), Device{}, pattern.size());
    tensor = Tensor::view(storage_, kGuard, shape, dtype);
  }
  bool untouched() const {
    std::vector<uint8_t> all(bytes_ + 2 * kGuard);
    device_api(device_).copy(all.data(), Device{}, storage_->data(), device_, all.size());
    for (size_t i = 0; i < kGuard; ++i)
      if (all[i] != kByte || all[kGuard + bytes_ + i] != kByte) return false;
    return true;
  }
  Tensor tensor;

 private:
  static constexpr size_t kGuard = 512;
  static constexpr uint8_t kByte = 0xa5;
  Device device_;
  size_t bytes_ = 0;
  std::shared_ptr<Storage> storage_;
};

struct Out {
  Shape shape;
  DType dtype = DType::F32;
};
using Run = std::function<void(const DenseKernels&, Tensors& out, const Tensors& in)>;

// Runs `run` with the CPU's kernels on dense inputs and with d's on the views, and compares: to the
// last bit when nmse is 0. 16-bit outputs are computed in F32 by the CPU and rounded.
inline void compare(Device d, const std::vector<Out>& outs, const std::vector<Input>& inputs,
                    double nmse, const Run& run, int repeats = 1) {
  Tensors want, dense, views;
  for (const Input& x : inputs) {
    dense.push_back(x.dense);
    views.push_back(x.view);
  }
  for (const Out& o : outs) {
    const bool narrow = o.dtype == DType::BF16 || o.dtype == DType::F16;
    want.push_back(Tensor::zeros(o.shape, narrow ? DType::F32 : o.dtype));
  }
  run(cpu_kernels(), want, dense);
  Tensors first;
  for (int round = 0; round <= repeats; ++round) {
    std::vector<Guarded> guarded;
    Tensors got;
    for (const Out& o : outs) {
      guarded.emplace_back(o.shape, o.dtype, d);
      got.push_back(guarded.back().tensor);
    }
    run(d.type == DeviceType::CPU ? cpu_kernels() : *cuda_kernels(), got, views);
    for (size_t i = 0; i < outs.size(); ++i) {
      CAPTURE(i);
      REQUIRE(guarded[i].untouched());
      if (round > 0) {
        REQUIRE(bit_equal(got[i], first[i]));
        continue;
      }
      const Tensor expected = converted(want[i], outs[i].dtype);
      if (nmse == 0)
        REQUIRE(bit_equal(got[i], expected));
      else
        REQUIRE(close(got[i], expected, outs[i].dtype == want[i].dtype() ? nmse : 1e-5));
    }
    if (round == 0) first = got;
  }
}

// Runs body(rng, device) on n random cases of every device.
inline void on_devices(int n, const std::function<void(Rng&, Device)>& body) {
  for (Device d : test_devices()) {
    CAPTURE(d);
    for_all(
        n, [](Rng& rng) { return &rng; }, [&](Rng* rng) { body(*rng, d); });
  }
}
inline bool gpu(Device d) { return d.type != DeviceType::CPU; }

// Sizes around the borders of packs, teams and blocks; sometimes none.
inline int64_t some_length(Rng& rng) {
  switch (rng.between(0, 5)) {
    case 0:
      return rng.between(1, 9);
    case 1:
      return 8 * rng.between(1, 40);
    case 2:
      return rng.between(250, 270);
    case 3:
      return 2048 + 8 * rng.between(-1, 2);
    case 4:
      return rng.between(2040, 2600);
    default:
      return rng.between(10, 300);
  }
}
inline Shape some_shape(Rng& rng, int dims, int64_t most) {
  Shape shape;
  for (int i = 0; i < dims; ++i)
    shape.push_back(rng.between(0, 30) == 0 ? 0
                    : rng.coin()            ? rng.between(1, most)
                                            : 8 * rng.between(1, (most + 7) / 8));
  return shape;
}
// Rows [a, b] or [a, b, n] of a length that matters.
inline Shape some_rows(Rng& rng) {
  const int64_t n = some_length(rng);
  if (rng.coin()) return {rng.between(rng.between(0, 5) == 0 ? 0 : 1, 20), n};
  return {rng.between(1, 3), rng.between(1, 5), n};
}
inline DType some_float(Rng& rng,
                        Device d) {  // what a GPU kernel may store; the CPU computes in F32
  const DType types[] = {DType::F32, DType::F32, DType::BF16, DType::F16};
  return gpu(d) ? types[rng.between(0, 3)] : DType::F32;
}
// The inputs of a kernel in the same or in 16 bits; the CPU's copy holds the rounded values.
inline Input float_input(Rng& rng, Shape shape, Device d, double lo = -2, double hi = 2) {
  const DType stored = some_float(rng, d);
  Input x = random_input(rng, shape, d, dense_or_shifted(rng), stored, lo, hi);
  x.dense = converted(x.dense, DType::F32);
  return x;
}
inline Input ids_input(Rng& rng, Shape shape, int64_t count, Device d, bool with_none = false) {
  Tensor ids = random_ids(rng, shape, count);
  for (int64_t i = 0; with_none && i < ids.numel(); ++i)
    if (rng.between(0, 4) == 0) ids.data<int32_t>()[i] = -1;
  return laid_out(rng, ids, d, Layout::Dense);
}

inline constexpr DType kStored[] = {DType::F32, DType::BF16, DType::F16,
                                    DType::I32, DType::I8,   DType::U8};

}  // namespace omq
