// Views and copies. Every view is an alias of the same Storage, and so is its gradient; only a
// slice's gradient is put back into a zero tensor of the source's shape.
#include "autograd/ops.h"

namespace omq {
namespace {

// The permutation-like case: every source element appears exactly once, so a gradient is again just
// a view.
Tensor permuting_view(const char* name, const Tensor& x, Shape shape, Strides strides,
                      std::function<Tensor(const Tensor&)> back) {
  return record(name, x.alias(shape, strides), {x},
                [back = std::move(back)](const Tensor& dy) -> Grads { return {back(dy)}; });
}

}  // namespace

Tensor contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;
  Tensor y = empty_like(x);
  on(x).copy(y, x);
  return record("contiguous", y, {x}, [](const Tensor& dy) -> Grads { return {dy}; });
}

Tensor reshape(const Tensor& x, Shape shape) {
  int64_t known = 1;
  int wild = -1;
  for (int i = 0; i < shape.n; ++i) {
    if (shape[i] == -1) {
      check(wild < 0, "reshape: two sizes of {} are -1", shape);
      wild = i;
    } else {
      check(shape[i] >= 0, "reshape: negative size in {}", shape);
      known *= shape[i];
    }
  }
  if (wild >= 0) shape[wild] = known > 0 ? x.numel() / known : 0;
  check(shape.product() == x.numel(), "reshape: {} elements of {} do not fit {}", x.numel(),
        x.shape(), shape);
  const Tensor source = contiguous(x);
  return permuting_view("reshape", source, shape, contiguous_strides(shape),
                        [from = source.shape()](const Tensor& dy) {
                          const Tensor d = contiguous(dy);
                          return d.alias(from, contiguous_strides(from));
                        });
}

Tensor transpose(const Tensor& x, int a, int b) {
  x.dim(a), x.dim(b);  // range check
  if (a < 0) a += x.ndim();
  if (b < 0) b += x.ndim();
  Shape shape = x.shape();
  Strides strides = x.strides();
  std::swap(shape[a], shape[b]);
  std::swap(strides[a], strides[b]);
  return permuting_view("transpose", x, shape, strides, [a, b](const Tensor& dy) {
    Shape s = dy.shape();
    Strides t = dy.strides();
    std::swap(s[a], s[b]);
    std::swap(t[a], t[b]);
    return dy.alias(s, t);
  });
}

Tensor slice(const Tensor& x, int dim, int64_t begin, int64_t end) {
  x.dim(dim);
  if (dim < 0) dim += x.ndim();
  check(begin >= 0 && begin <= end && end <= x.dim(dim), "slice: [{}, {}) of dim {} in shape {}",
        begin, end, dim, x.shape());
  Shape shape = x.shape();
  shape[dim] = end - begin;
  return record("slice", x.alias(shape, x.strides(), begin * x.stride(dim)), {x},
                [from = x.shape(), dim, begin, shape](const Tensor& dy) -> Grads {
                  Tensor dx = Tensor::zeros(from, dy.dtype(), dy.device());
                  Tensor window = dx.alias(shape, dx.strides(), begin * dx.stride(dim));
                  on(dy).copy(window, dy);
                  return {dx};
                });
}

Tensor expand(const Tensor& x, const Shape& shape) {
  check(shape.n == x.ndim(), "expand: {} to {}", x.shape(), shape);
  Strides strides = x.strides();
  for (int i = 0; i < shape.n; ++i) {
    check(x.dim(i) == shape[i] || x.dim(i) == 1, "expand: {} to {}", x.shape(), shape);
    if (x.dim(i) != shape[i]) strides[i] = 0;
  }
  return record("expand", x.alias(shape, strides), {x},
                [from = x.shape()](const Tensor& dy) -> Grads {
                  Tensor dx = Tensor::empty(from, dy.dtype(), dy.device());
                  on(dy).sum_to(dx, dy);
                  return {dx};
                });
}

Tensor to(const Tensor& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  Tensor y = Tensor::empty(x.shape(), dtype, x.device());
  on(x).copy(y, x);
  return record("to", y, {x},
                [from = x.dtype()](const Tensor& dy) -> Grads { return {to(dy, from)}; });
}

Tensor to(const Tensor& x, Device device) {
  if (x.device() == device) return x;
  check(!needs_grad(x), "to: moving to {} is not differentiable; detach() first",
        to_string(device));
  const Tensor source = contiguous(x);
  Tensor y = Tensor::empty(x.shape(), x.dtype(), device);
  const Device owner = device.type == DeviceType::CPU ? x.device() : device;
  device_api(owner).copy(y.raw(), device, source.raw(), x.device(), x.nbytes());
  return y;
}

}  // namespace omq
