// A matrix with its rows and columns scaled, and the gradients of the scales: the fold of an
// equivalent transformation (tensor/kernels.def).
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

constexpr int64_t kColumns = 512;  // of the strip in which a thread sums column by column

template <class T> const T* or_null(const Tensor& x) { return x.defined() ? x.data<T>() : nullptr; }

}  // namespace

void scale_matrix(Tensor& y, const Tensor& w, const Tensor& rows, const Tensor& cols) {
  const int64_t R = w.dim(0), C = w.dim(1);
  visit_float("scale_matrix", w.dtype(), [&]<class T>() {
    const T *in = w.data<T>(), *by_row = or_null<T>(rows), *by_col = or_null<T>(cols);
    T* out = y.data<T>();
    parallel_for(R, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, C)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     const T* p = in + r * C;
                     T* o = out + r * C;
                     const T f = by_row ? by_row[r] : T(1);
                     if (by_col)
                       for (int64_t c = 0; c < C; ++c) o[c] = p[c] * by_col[c] * f;
                     else
                       for (int64_t c = 0; c < C; ++c) o[c] = p[c] * f;
                   }
                 });
  });
}

void scale_matrix_vjp(Tensor& drows, Tensor& dcols, const Tensor& w, const Tensor& rows,
                      const Tensor& cols, const Tensor& dy) {
  const int64_t R = w.dim(0), C = w.dim(1);
  visit_float("scale_matrix_vjp", w.dtype(), [&]<class T>() {
    const T *in = w.data<T>(), *by_row = or_null<T>(rows), *by_col = or_null<T>(cols),
            *pd = dy.data<T>();
    if (drows.defined()) {
      T* out = drows.data<T>();
      parallel_for(
          R, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, C)),
          [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
              const T *p = in + r * C, *d = pd + r * C;
              out[r] = by_col ? lane_sum<T>(C, [&](int64_t c) { return d[c] * (p[c] * by_col[c]); })
                              : lane_sum<T>(C, [&](int64_t c) { return d[c] * p[c]; });
            }
          });
    }
    if (dcols.defined()) {  // a strip of columns a thread, rows in order
      T* out = dcols.data<T>();
      parallel_for((C + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          const int64_t first = s * kColumns, n = std::min(kColumns, C - first);
          double sum[kColumns] = {};
          for (int64_t r = 0; r < R; ++r) {
            const T *p = in + r * C + first, *d = pd + r * C + first;
            const T f = by_row ? by_row[r] : T(1);
            for (int64_t c = 0; c < n; ++c) sum[c] += static_cast<double>(d[c] * f * p[c]);
          }
          for (int64_t c = 0; c < n; ++c) out[first + c] = static_cast<T>(sum[c]);
        }
      });
    }
  });
}

}  // namespace omq::cpu
