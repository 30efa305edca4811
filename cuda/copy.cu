// fill and copy: any strides, any pair of dtypes but F64.
#include "cuda/common.cuh"
#include "cuda/walk.cuh"

namespace omq::cuda {
namespace {

// The CPU's conversion: 16-bit floats go through F32, the rest is a plain cast.
template <class To, class From> __device__ To convert(From v) {
  if constexpr (std::is_same_v<To, From>)
    return v;
  else if constexpr (std::is_same_v<From, __nv_bfloat16>)
    return convert<To>(__bfloat162float(v));
  else if constexpr (std::is_same_v<From, __half>)
    return convert<To>(__half2float(v));
  else if constexpr (std::is_same_v<To, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(v));
  else if constexpr (std::is_same_v<To, __half>)
    return __float2half_rn(static_cast<float>(v));
  else
    return static_cast<To>(v);
}

template <class F> __device__ void with_type(DType t, F&& f) {
  switch (t) {
    case DType::F32:
      return f(float{});
    case DType::BF16:
      return f(__nv_bfloat16{});
    case DType::F16:
      return f(__half{});
    case DType::I32:
      return f(int32_t{});
    case DType::I8:
      return f(int8_t{});
    case DType::U8:
      return f(uint8_t{});
    case DType::F64:
      return;
  }
}

__global__ void fill_kernel(void* y, DType dtype, Walk<1> w, double value) {
  for (int64_t i = grid_index(); i < w.count; i += grid_stride()) {
    int64_t at[1];
    offsets(w, i, at);
    with_type(dtype,
              [&](auto t) { static_cast<decltype(t)*>(y)[at[0]] = convert<decltype(t)>(value); });
  }
}

__global__ void copy_kernel(void* y, DType to, const void* x, DType from, Walk<2> w) {
  for (int64_t i = grid_index(); i < w.count; i += grid_stride()) {
    int64_t at[2];
    offsets(w, i, at);
    with_type(from, [&](auto f) {
      const auto v = static_cast<const decltype(f)*>(x)[at[1]];
      with_type(to, [&](auto t) { static_cast<decltype(t)*>(y)[at[0]] = convert<decltype(t)>(v); });
    });
  }
}

void no_f64(const char* op, const Tensor& x) {
  check(x.dtype() != DType::F64, "{}: F64 lives on the CPU only", op);
}

}  // namespace

// ---- launchers ----

void fill(Tensor& y, double value) {
  no_f64("fill", y);
  const Walk<1> w = make_walk<1>(y.shape(), {y.strides()});
  launch("fill", y, fill_kernel, blocks_for(w.count, 256), 256, 0, y.raw(), y.dtype(), w, value);
}

void copy(Tensor& y, const Tensor& x) {
  check(y.shape() == x.shape(), "copy: {} into {}", x.shape(), y.shape());
  no_f64("copy", y);
  no_f64("copy", x);
  const Walk<2> w = make_walk<2>(y.shape(), {y.strides(), x.strides()});
  launch("copy", y, copy_kernel, blocks_for(w.count, 256), 256, 0, y.raw(), y.dtype(), x.raw(),
         x.dtype(), w);
}

}  // namespace omq::cuda
