// Tensor: a typed, strided view of a Storage. The one value type of the library.
//
// A Tensor is a handle: copying it shares the Storage. It has no math methods (formulas are free
// functions in autograd/ops.h), never converts types or moves between devices by itself, and
// carries one opaque pointer that autograd/ owns. Sizes and strides count elements.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tensor/device.h"
#include "tensor/error.h"
#include "tensor/storage.h"

namespace omq {

struct GradNode;  // defined in autograd/node.h

// F64 exists for gradient checks only, on the CPU.
enum class DType : uint8_t { F64, F32, BF16, F16, I32, I8, U8 };

size_t dtype_size(DType t);           // bytes of one element
const char* dtype_name(DType t);      // "F32"; the names that safetensors uses
template <class T> DType dtype_of();  // double → F64 … uint8_t → U8; bf16_t, f16_t of numeric.h

// Up to six sizes or strides; trivially copyable, so that kernels take it by value.
struct Dims {
  static constexpr int kMax = 6;
  std::array<int64_t, kMax> d{};
  int n = 0;

  Dims() = default;
  Dims(std::initializer_list<int64_t> values);
  explicit Dims(std::span<const int64_t> values);

  int64_t& operator[](int i) { return d[static_cast<size_t>(i)]; }
  int64_t operator[](int i) const { return d[static_cast<size_t>(i)]; }
  int64_t back() const { return d[static_cast<size_t>(n - 1)]; }
  void push_back(int64_t v);
  int64_t product() const;  // 1 for no dims
  bool operator==(const Dims& o) const;
};
using Shape = Dims;
using Strides = Dims;
std::string to_string(const Dims& d);  // "[2, 3]"
Strides contiguous_strides(const Shape& shape);

class Tensor {
 public:
  Tensor() = default;  // undefined: defined() is false

  // Uninitialised, contiguous.
  static Tensor empty(Shape shape, DType dtype, Device device = {});
  // Filled with one value / copied from host values (CPU or device).
  static Tensor full(Shape shape, double value, DType dtype = DType::F32, Device device = {});
  static Tensor zeros(Shape shape, DType dtype = DType::F32, Device device = {});
  template <class T> static Tensor from(std::span<const T> values, Shape shape, Device device = {});
  template <class T>
  static Tensor from(std::initializer_list<T> values, Shape shape, Device device = {}) {
    return from(std::span<const T>(values.begin(), values.size()), shape, device);
  }
  // A view of bytes that start at byte_offset of storage. Throws Error when it would reach past the
  // end.
  static Tensor view(std::shared_ptr<Storage> storage, size_t byte_offset, Shape shape,
                     DType dtype);

  bool defined() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  const Strides& strides() const { return strides_; }
  int ndim() const { return shape_.n; }
  int64_t dim(int i) const;     // negative counts from the end; throws Error when out of range
  int64_t stride(int i) const;  // likewise
  int64_t numel() const { return shape_.product(); }
  size_t nbytes() const { return static_cast<size_t>(numel()) * dtype_size(dtype_); }
  DType dtype() const { return dtype_; }
  Device device() const { return storage_ ? storage_->device() : Device{}; }
  bool is_contiguous() const;
  const std::shared_ptr<Storage>& storage() const { return storage_; }

  // First element. Checks the dtype; throws Error when it differs.
  template <class T> T* data() const;
  void* raw() const;

  // The only element of a one-element tensor, on the host. The one call that synchronises with a
  // device.
  template <class T> T item() const;
  template <class T> std::vector<T> to_vector() const;  // host copy in row-major order

  // A raw view without history; offset in elements from this view's first element. Throws Error
  // when it would leave the Storage. (ops::… views are the differentiable ones.)
  Tensor alias(Shape shape, Strides strides, int64_t offset = 0) const;
  // The same view without history.
  Tensor detach() const;

  // History; belongs to autograd/ (opaque here, so that tensor/ knows nothing of gradients).
  const std::shared_ptr<GradNode>& node() const { return node_; }
  void set_node(std::shared_ptr<GradNode> node) { node_ = std::move(node); }

 private:
  std::shared_ptr<Storage> storage_;
  int64_t offset_ = 0;  // elements from the start of storage_ (plus byte_base_)
  size_t byte_base_ = 0;
  Shape shape_;
  Strides strides_;
  DType dtype_ = DType::F32;
  std::shared_ptr<GradNode> node_;
};

Tensor empty_like(const Tensor& x);
// Uninitialised host memory that `user` can read beside its work (DeviceApi::copy_ahead).
Tensor empty_pinned(Shape shape, DType dtype, Device user);
// Copies x's bytes into y, between any two devices. Both contiguous, of one shape and dtype; throws
// Error otherwise. When it returns, host memory holds the bytes, or may be written again.
void transfer(const Tensor& y, const Tensor& x);

}  // namespace omq

#ifndef __CUDACC__
template <> struct fmt::formatter<omq::Dims> : fmt::formatter<std::string> {
  template <class C> auto format(const omq::Dims& d, C& c) const {
    return fmt::formatter<std::string>::format(omq::to_string(d), c);
  }
};
#endif
