// Strided walks: up to six dims merged to the few that matter, over N tensors at once. Host side
// builds a Walk, kernels turn a running index into one offset per tensor.
#pragma once

#include <array>

#include "cuda/common.cuh"

namespace omq::cuda {

template <int N> struct Walk {  // passed to kernels by value
  int n = 0;                    // dims after merging, at least 1
  int64_t size[Dims::kMax] = {};
  int64_t step[N][Dims::kMax] = {};  // elements
  int64_t count = 0;                 // elements in all

  int64_t inner() const { return size[n - 1]; }
  int64_t inner_step(int t) const { return step[t][n - 1]; }
};

// Dims of size 1 are dropped, dims that are jointly contiguous in all tensors are merged.
template <int N> Walk<N> make_walk(const Shape& shape, const std::array<Strides, N>& strides) {
  Walk<N> w;
  w.count = shape.product();
  for (int i = 0; i < shape.n; ++i) {
    if (shape[i] == 1) continue;
    bool merged = w.n > 0;
    for (int t = 0; t < N && merged; ++t)
      merged = w.step[t][w.n - 1] == strides[static_cast<size_t>(t)][i] * shape[i];
    if (!merged) ++w.n;
    w.size[w.n - 1] = merged ? w.size[w.n - 1] * shape[i] : shape[i];
    for (int t = 0; t < N; ++t) w.step[t][w.n - 1] = strides[static_cast<size_t>(t)][i];
  }
  if (w.n == 0) {
    w.n = 1;
    w.size[0] = 1;
    for (int t = 0; t < N; ++t) w.step[t][0] = 1;
  }
  return w;
}

// Offsets (elements) of the i-th element in row-major order.
template <int N> __device__ void offsets(const Walk<N>& w, int64_t i, int64_t (&at)[N]) {
#pragma unroll
  for (int t = 0; t < N; ++t) at[t] = 0;
  for (int d = w.n - 1; d > 0; --d) {
    const int64_t rest = divide(i, w.size[d]), index = i - rest * w.size[d];
#pragma unroll
    for (int t = 0; t < N; ++t) at[t] += index * w.step[t][d];
    i = rest;
  }
#pragma unroll
  for (int t = 0; t < N; ++t) at[t] += i * w.step[t][0];
}

// Whether the walk can go in packs of eight: the inner dim is a multiple of 8, each tensor is
// contiguous along it (or, where allowed, constant), and every pack starts on 16 bytes.
template <int N>
bool packable(const Walk<N>& w, const std::array<const void*, N>& base,
              const std::array<bool, N>& may_be_constant) {
  if (w.inner() % kPack != 0) return false;
  for (int t = 0; t < N; ++t) {
    if (w.inner_step(t) == 0 && may_be_constant[static_cast<size_t>(t)]) continue;
    if (w.inner_step(t) != 1 || !aligned16(base[static_cast<size_t>(t)])) return false;
    for (int d = 0; d < w.n - 1; ++d)
      if (w.step[t][d] % kPack != 0) return false;
  }
  return true;
}

}  // namespace omq::cuda
