// Tensor: views and their bounds. Arithmetic lives in the kernels.
#include "tensor/tensor.h"

#include <algorithm>
#include <cstring>

#include "tensor/kernels.h"
#include "tensor/numeric.h"

namespace omq {

size_t dtype_size(DType t) {
  return visit_dtype(t, [&]<class T>() { return sizeof(T); });
}

const char* dtype_name(DType t) {
  constexpr const char* kNames[] = {"F64", "F32", "BF16", "F16", "I32", "I8", "U8"};
  return kNames[static_cast<size_t>(t)];
}

template <> DType dtype_of<double>() { return DType::F64; }
template <> DType dtype_of<float>() { return DType::F32; }
template <> DType dtype_of<bf16_t>() { return DType::BF16; }
template <> DType dtype_of<f16_t>() { return DType::F16; }
template <> DType dtype_of<int32_t>() { return DType::I32; }
template <> DType dtype_of<int8_t>() { return DType::I8; }
template <> DType dtype_of<uint8_t>() { return DType::U8; }

Dims::Dims(std::initializer_list<int64_t> values)
    : Dims(std::span<const int64_t>(values.begin(), values.size())) {}

Dims::Dims(std::span<const int64_t> values) {
  for (int64_t v : values) push_back(v);
}

void Dims::push_back(int64_t v) {
  check(n < kMax, "Dims: more than {} dimensions", kMax);
  d[static_cast<size_t>(n++)] = v;
}

int64_t Dims::product() const {
  int64_t p = 1;
  for (int i = 0; i < n; ++i) p *= (*this)[i];
  return p;
}

bool Dims::operator==(const Dims& o) const {
  return n == o.n && std::equal(d.begin(), d.begin() + n, o.d.begin());
}

std::string to_string(const Dims& d) {
  return fmt::format("[{}]", fmt::join(d.d.begin(), d.d.begin() + d.n, ", "));
}

Strides contiguous_strides(const Shape& shape) {
  Strides s = shape;
  int64_t step = 1;
  for (int i = shape.n - 1; i >= 0; --i) {
    s[i] = step;
    step *= shape[i];
  }
  return s;
}

namespace {
// Elements of a shape that may come from anywhere.
int64_t checked_count(const char* op, const Shape& shape) {
  int64_t count = 1;
  for (int i = 0; i < shape.n; ++i) {
    check(shape[i] >= 0, "{}: negative size in {}", op, shape);
    check(shape[i] == 0 || count <= (int64_t{1} << 46) / shape[i], "{}: {} is too large", op,
          shape);
    count *= shape[i];
  }
  return count;
}
}  // namespace

Tensor Tensor::empty(Shape shape, DType dtype, Device device) {
  const int64_t count = checked_count("empty", shape);
  Tensor t;
  t.storage_ = Storage::allocate(static_cast<size_t>(count) * dtype_size(dtype), device);
  t.shape_ = shape;
  t.strides_ = contiguous_strides(shape);
  t.dtype_ = dtype;
  return t;
}

Tensor Tensor::full(Shape shape, double value, DType dtype, Device device) {
  Tensor t = empty(shape, dtype, device);
  on(t).fill(t, value);
  return t;
}

Tensor Tensor::zeros(Shape shape, DType dtype, Device device) {
  return full(shape, 0.0, dtype, device);
}

template <class T> Tensor Tensor::from(std::span<const T> values, Shape shape, Device device) {
  check(static_cast<int64_t>(values.size()) == shape.product(), "from: {} values for shape {}",
        values.size(), shape);
  Tensor t = empty(shape, dtype_of<T>(), device);
  if (!values.empty())
    device_api(device).copy(t.raw(), device, values.data(), Device{}, values.size_bytes());
  return t;
}

Tensor Tensor::view(std::shared_ptr<Storage> storage, size_t byte_offset, Shape shape,
                    DType dtype) {
  const size_t bytes = static_cast<size_t>(checked_count("view", shape)) * dtype_size(dtype);
  check(byte_offset <= storage->bytes() && bytes <= storage->bytes() - byte_offset,
        "view: shape {} of {} at byte {} does not fit in {} bytes", shape, dtype_name(dtype),
        byte_offset, storage->bytes());
  Tensor t;
  t.storage_ = std::move(storage);
  t.byte_base_ = byte_offset;
  t.shape_ = shape;
  t.strides_ = contiguous_strides(shape);
  t.dtype_ = dtype;
  return t;
}

namespace {
int wrap(int i, int n, const Shape& shape) {
  const int j = i < 0 ? i + n : i;
  check(j >= 0 && j < n, "dim: index {} out of range for shape {}", i, shape);
  return j;
}
}  // namespace

int64_t Tensor::dim(int i) const { return shape_[wrap(i, shape_.n, shape_)]; }
int64_t Tensor::stride(int i) const { return strides_[wrap(i, shape_.n, shape_)]; }

bool Tensor::is_contiguous() const {
  int64_t step = 1;
  for (int i = shape_.n - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != step) return false;
    step *= shape_[i];
  }
  return true;
}

void* Tensor::raw() const {
  check(defined(), "tensor: undefined");
  return static_cast<char*>(storage_->data()) + byte_base_ +
         static_cast<size_t>(offset_) * dtype_size(dtype_);
}

template <class T> T* Tensor::data() const {
  check(dtype_ == dtype_of<T>(), "tensor: holds {}, asked for {}", dtype_name(dtype_),
        dtype_name(dtype_of<T>()));
  return static_cast<T*>(raw());
}

template <class T> T Tensor::item() const {
  check(numel() == 1, "item: shape {} has {} elements", shape_, numel());
  check(dtype_ == dtype_of<T>(), "item: holds {}, asked for {}", dtype_name(dtype_),
        dtype_name(dtype_of<T>()));
  T value;
  device_api(device()).copy(&value, Device{}, raw(), device(), sizeof(T));
  return value;
}

template <class T> std::vector<T> Tensor::to_vector() const {
  Tensor t = *this;
  if (!is_contiguous()) {
    t = empty(shape_, dtype_, device());
    on(t).copy(t, *this);
  }
  std::vector<T> values(static_cast<size_t>(numel()));
  check(dtype_ == dtype_of<T>(), "to_vector: holds {}, asked for {}", dtype_name(dtype_),
        dtype_name(dtype_of<T>()));
  if (!values.empty())
    device_api(device()).copy(values.data(), Device{}, t.raw(), device(),
                              values.size() * sizeof(T));
  return values;
}

Tensor Tensor::alias(Shape shape, Strides strides, int64_t offset) const {
  check(defined(), "alias: undefined tensor");
  check(shape.n == strides.n, "alias: {} sizes, {} strides", shape.n, strides.n);
  int64_t low = offset_ + offset, high = low;
  for (int i = 0; i < shape.n; ++i) {
    if (shape[i] == 0) high = low;  // empty: touches nothing
    (strides[i] >= 0 ? high : low) += (shape[i] - 1) * strides[i];
  }
  const int64_t room = static_cast<int64_t>((storage_->bytes() - byte_base_) / dtype_size(dtype_));
  check(shape.product() == 0 || (low >= 0 && high < room),
        "alias: shape {} with strides {} leaves its storage of {}", shape, strides, room);
  Tensor t = detach();
  t.shape_ = shape;
  t.strides_ = strides;
  t.offset_ = offset_ + offset;
  return t;
}

Tensor Tensor::detach() const {
  Tensor t = *this;
  t.node_.reset();
  return t;
}

Tensor empty_like(const Tensor& x) { return Tensor::empty(x.shape(), x.dtype(), x.device()); }

Tensor empty_pinned(Shape shape, DType dtype, Device user) {
  const DeviceApi& api = device_api(user);
  const size_t bytes = static_cast<size_t>(shape.product()) * dtype_size(dtype);
  void* const block = api.alloc_pinned(bytes, user.index);
  std::shared_ptr<void> owner(
      block, [&api, bytes, index = user.index](void* p) { api.free_pinned(p, bytes, index); });
  return Tensor::view(Storage::borrow(block, bytes, Device{}, std::move(owner)), 0, shape, dtype);
}

void transfer(const Tensor& y, const Tensor& x) {
  check(x.shape() == y.shape() && x.dtype() == y.dtype() && x.is_contiguous() && y.is_contiguous(),
        "transfer: {} {} into {} {}: contiguous tensors of one shape and dtype wanted",
        dtype_name(x.dtype()), x.shape(), dtype_name(y.dtype()), y.shape());
  const Device via = y.device().type == DeviceType::CPU ? x.device() : y.device();
  device_api(via).copy(y.raw(), y.device(), x.raw(), x.device(), x.nbytes());
}

#define OMQ_INSTANTIATE(T)                              \
  template T* Tensor::data<T>() const;                  \
  template T Tensor::item<T>() const;                   \
  template std::vector<T> Tensor::to_vector<T>() const; \
  template Tensor Tensor::from<T>(std::span<const T>, Shape, Device);
OMQ_INSTANTIATE(double)
OMQ_INSTANTIATE(float)
OMQ_INSTANTIATE(bf16_t)
OMQ_INSTANTIATE(f16_t)
OMQ_INSTANTIATE(int32_t)
OMQ_INSTANTIATE(int8_t)
OMQ_INSTANTIATE(uint8_t)
#undef OMQ_INSTANTIATE

}  // namespace omq
