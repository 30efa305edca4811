// Packed weights on the CPU and on a device, for the tests of its kernels.
#pragma once

#include <doctest/doctest.h>

#include "tensor/kernels.h"
#include "tensor/packed.h"
#include "tests/support/device_compare.h"

namespace omq {

inline constexpr double kRounded = 1e-6;  // NMSE: x keeps 11 bits

inline Tensor floats(Shape shape, Device d = {}) { return Tensor::empty(shape, DType::F32, d); }

struct Packed {
  PackedInt cpu, device;
};

inline Packed random_packed(Rng& rng, int64_t rows, int64_t cols, GroupSpec spec, Device d) {
  const int64_t groups = spec.groups(cols);
  Tensor codes = Tensor::empty({rows, cols}, DType::U8);
  Tensor scale = floats({rows, groups}), zero = floats({rows, groups});
  for (int64_t i = 0; i < codes.numel(); ++i)
    codes.data<uint8_t>()[i] = static_cast<uint8_t>(rng.between(0, spec.max_code()));
  for (int64_t i = 0; i < scale.numel(); ++i) {
    scale.data<float>()[i] = static_cast<float>(rng.between(1, 64)) / 1024.0f;
    zero.data<float>()[i] = spec.symmetric ? static_cast<float>(1 << (spec.bits - 1))
                                           : static_cast<float>(rng.between(0, spec.max_code()));
  }
  Packed p;
  p.cpu = pack_codes(codes, scale, zero, spec);
  PackedInt raw = p.cpu;
  raw.data = uploaded(p.cpu.data, d);
  packed_on(raw.data).packed_arrange(p.device, raw);
  return p;
}

// With the kernels that suit the device, then with those of the oldest supported ones.
template <class F> void on_both_paths(Device d, F&& body) {
  body();
  if (d.type == DeviceType::CPU) return;
  const PlainPath plain(d);
  body();
}

}  // namespace omq
