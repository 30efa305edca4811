// Rotary embedding, half-split pairs: (x₁, x₂) → (x₁ c − x₂ s, x₂ c + x₁ s); `inverse` turns the
// other way.
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {

void rope(Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions,
          bool inverse) {
  const int64_t tokens = x.dim(1), heads = x.dim(2), d = x.dim(3), half = d / 2, table = cos.dim(0);
  const int32_t* at = positions.data<int32_t>();
  for (int64_t t = 0; t < tokens; ++t)
    check(at[t] >= 0 && at[t] < table, "rope: position {} beyond the table's {}", at[t], table);
  visit_float("rope", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *pc = cos.data<T>(), *ps = sin.data<T>();
    T* out = y.data<T>();
    const T sign = inverse ? T(-1) : T(1);
    parallel_for(x.dim(0) * tokens, std::max<int64_t>(1, kGrain / (heads * d)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) {
                     const T *c = pc + at[row % tokens] * half, *s = ps + at[row % tokens] * half;
                     for (int64_t h = 0; h < heads; ++h) {
                       const T* p = in + (row * heads + h) * d;
                       T* o = out + (row * heads + h) * d;
                       for (int64_t i = 0; i < half; ++i) {
                         const T a = p[i], b = p[i + half];
                         o[i] = a * c[i] - b * (sign * s[i]);
                         o[i + half] = b * c[i] + a * (sign * s[i]);
                       }
                     }
                   }
                 });
  });
}

}  // namespace omq::cpu
