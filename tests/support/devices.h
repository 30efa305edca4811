// The devices that a test body runs on: the CPU, and the GPU when this build has a back end and the
// machine a GPU.
//
//   for (Device d : test_devices()) { CAPTURE(d); … }
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "tensor/tensor.h"

namespace omq {

// `all`, or `few` where OMQ_TEST_FEW is set: under compute-sanitizer a kernel takes a hundred times
// as long, and what it looks for is there in the first steps.
inline int64_t all_or_few(int64_t all, int64_t few) {
  return std::getenv("OMQ_TEST_FEW") != nullptr ? few : all;
}
inline std::vector<int64_t> all_or_few(std::vector<int64_t> all, std::vector<int64_t> few) {
  return std::getenv("OMQ_TEST_FEW") != nullptr ? few : all;
}

inline const std::vector<Device>& test_devices() {
  static const std::vector<Device> devices = [] {
    std::vector<Device> found{Device{}};
    if (cuda_device_api()) {
      const Device gpu{DeviceType::CUDA, 0};
      try {
        Tensor::empty({1}, DType::F32, gpu);
        found.push_back(gpu);
      } catch (const Error& e) {
        MESSAGE("skipped: " << std::string(e.what()));
      }
    }
    return found;
  }();
  return devices;
}

// Kernels of the oldest supported devices, for a scope.
struct PlainPath {
  Device d;
  explicit PlainPath(Device where) : d(where) { device_api(d).set_plain_path(true, d.index); }
  ~PlainPath() { device_api(d).set_plain_path(false, d.index); }
  PlainPath(const PlainPath&) = delete;
  PlainPath& operator=(const PlainPath&) = delete;
};

}  // namespace omq

template <> struct doctest::StringMaker<omq::Device> {
  static String convert(const omq::Device& d) { return omq::to_string(d).c_str(); }
};
template <> struct doctest::StringMaker<omq::Dims> {
  static String convert(const omq::Dims& d) { return omq::to_string(d).c_str(); }
};
