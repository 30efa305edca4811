// fill and copy: any strides, any pair of dtypes.
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

template <class To, class From> To convert(From v) {
  if constexpr (std::is_same_v<To, From>)
    return v;
  else if constexpr (std::is_same_v<From, bf16_t> || std::is_same_v<From, f16_t>)
    return convert<To>(static_cast<float>(v));
  else if constexpr (std::is_same_v<To, bf16_t> || std::is_same_v<To, f16_t>)
    return To(static_cast<float>(v));
  else
    return static_cast<To>(v);
}

}  // namespace

void fill(Tensor& y, double value) {
  visit_dtype(y.dtype(), [&]<class T>() {
    T* out = y.data<T>();
    const T v = convert<T>(value);
    for_each_row<1>(y.shape(), {y.strides()}, [&](auto at, int64_t n, auto step) {
      T* o = out + at[0];
      if (step[0] == 1)
        std::fill_n(o, n, v);
      else
        for (int64_t i = 0; i < n; ++i) o[i * step[0]] = v;
    });
  });
}

void copy(Tensor& y, const Tensor& x) {
  check(y.shape() == x.shape(), "copy: {} into {}", x.shape(), y.shape());
  visit_dtype(y.dtype(), [&]<class To>() {
    visit_dtype(x.dtype(), [&]<class From>() {
      To* out = y.data<To>();
      const From* in = x.data<From>();
      for_each_row<2>(y.shape(), {y.strides(), x.strides()}, [&](auto at, int64_t n, auto step) {
        To* o = out + at[0];
        const From* p = in + at[1];
        if (step[0] == 1 && step[1] == 1) {
          for (int64_t i = 0; i < n; ++i) o[i] = convert<To>(p[i]);
        } else {
          for (int64_t i = 0; i < n; ++i) o[i * step[0]] = convert<To>(p[i * step[1]]);
        }
      });
    });
  });
}

}  // namespace omq::cpu
