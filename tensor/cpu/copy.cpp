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

namespace {

template <class To, class From> void copy_as(Tensor& y, const Tensor& x) {
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
}

template <class F> void visit_integer(DType t, F&& f) {
  if (t == DType::I32) return f.template operator()<int32_t>();
  if (t == DType::I8) return f.template operator()<int8_t>();
  f.template operator()<uint8_t>();
}
bool is_integer(DType t) { return t == DType::I32 || t == DType::I8 || t == DType::U8; }

}  // namespace

// What is copied all the time has a loop for the pair, and so have integers, which wrap around. The
// others go by way of F64, which holds every type that we have: a loop for each of the 49 pairs
// was 40 KB.
void copy(Tensor& y, const Tensor& x) {
  check(y.shape() == x.shape(), "copy: {} into {}", x.shape(), y.shape());
  const DType to = y.dtype(), from = x.dtype();
  if (to == from) return visit_dtype(to, [&]<class T>() { copy_as<T, T>(y, x); });
  if (from == DType::F32) return visit_dtype(to, [&]<class T>() { copy_as<T, float>(y, x); });
  if (to == DType::F32) return visit_dtype(from, [&]<class T>() { copy_as<float, T>(y, x); });
  if (to == DType::F64) return visit_dtype(from, [&]<class T>() { copy_as<double, T>(y, x); });
  if (from == DType::F64) return visit_dtype(to, [&]<class T>() { copy_as<T, double>(y, x); });
  if (is_integer(to) && is_integer(from))
    return visit_integer(to, [&]<class To>() {
      visit_integer(from, [&]<class From>() { copy_as<To, From>(y, x); });
    });
  Tensor wide = Tensor::empty(x.shape(), DType::F64);
  copy(wide, x);
  copy(y, wide);
}

}  // namespace omq::cpu
