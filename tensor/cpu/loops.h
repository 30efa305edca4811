// Loops that the CPU kernels share: strided walks over up to three tensors, and sums whose order is
// fixed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "tensor/parallel.h"
#include "tensor/tensor.h"

// Compiles a function twice, the second time for AVX-512 (x86-64-v4), and takes that one where it
// runs: for loops that have many operations an element. Results are the same, for neither sums nor
// rounding depend on the width of a vector. Not for templates; what the function calls must be
// inlined to take part.
// (GCC 12 knows x86-64-v4 there; the choice at start is the GNU C library's.)
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(OMQ_NO_WIDE)
#define OMQ_WIDE [[gnu::target_clones("arch=x86-64-v4", "default")]]
#else
#define OMQ_WIDE
#endif

namespace omq::cpu {

inline constexpr int64_t kGrain =
    65536;  // elements of cheap work that are worth waking a thread for

// Calls row(offsets, n, strides) for every innermost run of n elements, in parallel; offsets and
// strides (elements) of each of the N tensors. Dims that are jointly contiguous are merged first,
// so plain tensors become one long run.
template <size_t N, class Row>
void for_each_row(const Shape& shape, const std::array<Strides, N>& strides, Row&& row) {
  Dims size;
  std::array<Dims, N> step;
  for (int i = 0; i < shape.n; ++i) {
    if (shape[i] == 1) continue;
    bool merged = size.n > 0;
    for (size_t t = 0; t < N && merged; ++t) merged = step[t].back() == strides[t][i] * shape[i];
    if (merged) {
      size[size.n - 1] *= shape[i];
      for (size_t t = 0; t < N; ++t) step[t][size.n - 1] = strides[t][i];
    } else {
      size.push_back(shape[i]);
      for (size_t t = 0; t < N; ++t) step[t].push_back(strides[t][i]);
    }
  }
  if (shape.product() == 0) return;
  if (size.n == 0) {
    size.push_back(1);
    for (size_t t = 0; t < N; ++t) step[t].push_back(1);
  }
  const int64_t inner = size.back();
  std::array<int64_t, N> inner_step;
  for (size_t t = 0; t < N; ++t) inner_step[t] = step[t].back();
  const int64_t outer = size.product() / inner;
  if (outer == 1) {
    parallel_for(inner, kGrain, [&](int64_t begin, int64_t end) {
      std::array<int64_t, N> at;
      for (size_t t = 0; t < N; ++t) at[t] = begin * inner_step[t];
      row(at, end - begin, inner_step);
    });
    return;
  }
  parallel_for(outer, std::max<int64_t>(1, kGrain / inner), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::array<int64_t, N> at{};
      int64_t rest = r;
      for (int i = size.n - 2; i >= 0; --i) {
        const int64_t index = rest % size[i];
        rest /= size[i];
        for (size_t t = 0; t < N; ++t) at[t] += index * step[t][i];
      }
      row(at, inner, inner_step);
    }
  });
}

// The sum of eight lanes, always in this order.
template <class T> T fold_lanes(const T (&lanes)[8]) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Σ f(i) for i in [0, n), in eight running lanes (so that it vectorises) that are folded in a fixed
// order.
template <class T, class F> [[gnu::always_inline]] inline T lane_sum(int64_t n, F&& f) {
  T lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    T v[8];  // apart from the additions: so more of them vectorise
    for (int64_t j = 0; j < 8; ++j) v[j] = f(i + j);
    for (int64_t j = 0; j < 8; ++j) lanes[j] += v[j];
  }
  for (int64_t j = 0; i < n; ++i, ++j) lanes[j] += f(i);
  return fold_lanes(lanes);
}

// The same sum of terms that take many operations: they are made some at a time before they are
// added. GCC vectorises the one loop and the other, but not both in one (with a value or a product
// of two as a term it does, and faster).
template <class T, class F> [[gnu::always_inline]] inline T lane_sum_apart(int64_t n, F&& f) {
  constexpr int64_t kTerms = 64;
  T lanes[8] = {}, terms[kTerms];
  for (int64_t i = 0; i < n; i += kTerms) {
    const int64_t some = std::min(kTerms, n - i);
    for (int64_t j = 0; j < some; ++j) terms[j] = f(i + j);
    int64_t j = 0;
    for (; j + 8 <= some; j += 8)
      for (int64_t l = 0; l < 8; ++l) lanes[l] += terms[j + l];
    for (int64_t l = 0; j < some; ++j, ++l) lanes[l] += terms[j];
  }
  return fold_lanes(lanes);
}

// So many lanes that GCC keeps the inner loops, which it vectorises, instead of unrolling them,
// which it does not.
template <class T, class F> T lane_max(int64_t n, T start, F&& f) {
  constexpr int64_t kLanes = 32;
  T lanes[kLanes];
  for (T& l : lanes) l = start;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const T v = f(i + j);
      lanes[j] = v > lanes[j] ? v : lanes[j];
    }
  for (int64_t j = 0; i < n; ++i, ++j) {
    const T v = f(i);
    lanes[j] = v > lanes[j] ? v : lanes[j];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j)
      lanes[j] = lanes[j + half] > lanes[j] ? lanes[j + half] : lanes[j];
  return lanes[0];
}

template <class T> struct Extremes { T hi, lo; };

// Largest and smallest of p[0] … p[n−1] and start's two. NaN is passed over. Lanes as lane_max's.
template <class T>
[[gnu::always_inline]] inline Extremes<T> extremes(const T* p, int64_t n, Extremes<T> start) {
  constexpr int64_t kLanes = 32;
  T hi[kLanes], lo[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) hi[j] = start.hi, lo[j] = start.lo;
  const auto take = [&](int64_t j, T high, T low) {
    hi[j] = high > hi[j] ? high : hi[j];
    lo[j] = low < lo[j] ? low : lo[j];
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) take(j, p[i + j], p[i + j]);
  for (int64_t j = 0; i < n; ++i, ++j) take(j, p[i], p[i]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) take(j, hi[j + half], lo[j + half]);
  return {hi[0], lo[0]};
}

// How many of them are equal to each of the two (n below 2²⁴: counted in T).
template <class T> Extremes<T> counts(const T* p, int64_t n, Extremes<T> of) {
  constexpr int64_t kLanes = 8;
  T hi[kLanes] = {}, lo[kLanes] = {};
  const auto take = [&](int64_t i, int64_t lanes) {
    for (int64_t j = 0; j < lanes; ++j) hi[j] += p[i + j] == of.hi ? T(1) : T(0);
    for (int64_t j = 0; j < lanes; ++j) lo[j] += p[i + j] == of.lo ? T(1) : T(0);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) take(i, kLanes);
  take(i, n - i);
  for (int64_t j = 1; j < kLanes; ++j) hi[0] += hi[j], lo[0] += lo[j];
  return {hi[0], lo[0]};
}

inline int64_t rows_of(const Tensor& x) {
  return x.numel() == 0 ? 0 : x.numel() / x.shape().back();
}

}  // namespace omq::cpu
