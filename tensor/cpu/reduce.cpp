// Sums over dims, and the extremes of groups of a row. Sums run in double and in an order that does
// not depend on the number of threads.
#include <vector>

#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

// Offsets of every index combination of the dims listed, row-major.
std::vector<int64_t> offsets_of(const Tensor& x, const std::vector<int>& dims) {
  std::vector<int64_t> out{0};
  for (int d : dims) {
    std::vector<int64_t> next;
    next.reserve(out.size() * static_cast<size_t>(x.dim(d)));
    for (int64_t base : out)
      for (int64_t i = 0; i < x.dim(d); ++i) next.push_back(base + i * x.stride(d));
    out = std::move(next);
  }
  return out;
}

template <class T> double run_sum(const T* p, int64_t n, int64_t step) {
  if (step == 1) return lane_sum<double>(n, [p](int64_t i) { return static_cast<double>(p[i]); });
  return lane_sum<double>(n, [p, step](int64_t i) { return static_cast<double>(p[i * step]); });
}

// The last dim is summed away: one output per kept index.
template <class T>
void sum_rows(T* out, const T* in, const std::vector<int64_t>& kept,
              const std::vector<int64_t>& outer, int64_t n, int64_t step) {
  const int64_t per_output = static_cast<int64_t>(outer.size()) * n;
  if (kept.size() == 1 && per_output > kGrain) {  // a full reduction: partial sums of fixed pieces
    const int64_t pieces = (n + kGrain - 1) / kGrain;
    std::vector<double> partial(outer.size() * static_cast<size_t>(pieces));
    parallel_for(static_cast<int64_t>(partial.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i % pieces * kGrain;
        partial[static_cast<size_t>(i)] =
            run_sum(in + kept[0] + outer[static_cast<size_t>(i / pieces)] + start * step,
                    std::min(kGrain, n - start), step);
      }
    });
    double total = 0;
    for (double v : partial) total += v;
    out[0] = static_cast<T>(total);
    return;
  }
  parallel_for(static_cast<int64_t>(kept.size()),
               std::max<int64_t>(1, kGrain / std::max<int64_t>(1, per_output)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   double total = 0;
                   for (int64_t o : outer)
                     total += run_sum(in + kept[static_cast<size_t>(i)] + o, n, step);
                   out[i] = static_cast<T>(total);
                 }
               });
}

// The last dim stays: columns are summed side by side.
template <class T>
void sum_columns(T* out, const T* in, const std::vector<int64_t>& kept,
                 const std::vector<int64_t>& reduced, int64_t n, int64_t step) {
  constexpr int64_t kWidth = 64;
  const int64_t strips = (n + kWidth - 1) / kWidth;
  parallel_for(static_cast<int64_t>(kept.size()) * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % strips * kWidth, width = std::min(kWidth, n - start);
      double acc[kWidth] = {};
      for (int64_t r : reduced) {
        const T* p = in + kept[static_cast<size_t>(i / strips)] + r + start * step;
        for (int64_t j = 0; j < width; ++j) acc[j] += static_cast<double>(p[j * step]);
      }
      T* o = out + i / strips * n + start;
      for (int64_t j = 0; j < width; ++j) o[j] = static_cast<T>(acc[j]);
    }
  });
}

}  // namespace

void sum_to(Tensor& y, const Tensor& x) {
  std::vector<int> kept, reduced;
  const int last = x.ndim() - 1;
  for (int i = 0; i < last; ++i) (y.dim(i) == x.dim(i) ? kept : reduced).push_back(i);
  const bool keep_last = y.dim(last) == x.dim(last);
  visit_float("sum_to", x.dtype(), [&]<class T>() {
    T* out = y.data<T>();
    const T* in = x.data<T>();
    const auto kept_at = offsets_of(x, kept), reduced_at = offsets_of(x, reduced);
    if (keep_last)
      sum_columns(out, in, kept_at, reduced_at, x.dim(last), x.stride(last));
    else
      sum_rows(out, in, kept_at, reduced_at, x.dim(last), x.stride(last));
  });
}

void group_range(Tensor& hi, Tensor& lo, const Tensor& x, GroupSpec s) {
  const int64_t rows = x.dim(0), cols = x.dim(1), width = s.group_cols(cols),
                groups = s.groups(cols);
  visit_float("group_range", x.dtype(), [&]<class T>() {
    const T* in = x.data<T>();
    T *top = hi.data<T>(), *bottom = lo.data<T>();
    parallel_for(rows, std::max<int64_t>(1, kGrain / cols), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t g = 0; g < groups; ++g) {
          const T* p = in + r * x.stride(0) + g * width * x.stride(1);
          const int64_t n = std::min(width, cols - g * width), step = x.stride(1);
          Extremes<T> e{s.include_zero ? T(0) : p[0], s.include_zero ? -T(0) : p[0]};
          if (step == 1) {
            e = extremes(p, n, e);
          } else {
            for (int64_t i = 0; i < n; ++i) {
              e.hi = p[i * step] > e.hi ? p[i * step] : e.hi;
              e.lo = p[i * step] < e.lo ? p[i * step] : e.lo;
            }
          }
          top[r * groups + g] = e.hi;
          bottom[r * groups + g] = e.lo;
        }
    });
  });
}

void group_range_vjp(Tensor& dx, const Tensor& x, const Tensor& hi, const Tensor& lo,
                     const Tensor& dhi, const Tensor& dlo, GroupSpec s) {
  const int64_t rows = x.dim(0), cols = x.dim(1), width = s.group_cols(cols),
                groups = s.groups(cols);
  visit_float("group_range_vjp", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *top = hi.data<T>(), *bottom = lo.data<T>(), *dt = dhi.data<T>(),
            *db = dlo.data<T>();
    T* out = dx.data<T>();
    parallel_for(rows, std::max<int64_t>(1, kGrain / cols), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t at = r * groups + g, n = std::min(width, cols - g * width),
                        step = x.stride(1);
          const T* p = in + r * x.stride(0) + g * width * step;
          T* o = out + r * cols + g * width;
          int64_t n_hi = 0, n_lo = 0;
          for (int64_t i = 0; i < n; ++i)
            n_hi += p[i * step] == top[at], n_lo += p[i * step] == bottom[at];
          const T share_hi = n_hi ? dt[at] / static_cast<T>(n_hi) : T(0);
          const T share_lo = n_lo ? db[at] / static_cast<T>(n_lo) : T(0);
          for (int64_t i = 0; i < n; ++i)
            o[i] = (p[i * step] == top[at] ? share_hi : T(0)) +
                   (p[i * step] == bottom[at] ? share_lo : T(0));
        }
    });
  });
}

}  // namespace omq::cpu
