// Softmax over the last dim and its gradient: a team of threads per row.
//
// Bytes: forward x once, y once; backward y and dy once, dx once (a row's second reading comes from
// the cache).
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

__device__ inline float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// n: pieces of a row.
template <int kTeam, int W>
__global__ void softmax_kernel(Operand y, Operand x, int64_t rows, int64_t n) {
  for_each_team<kTeam>(rows, [&](int64_t row, int lane, bool valid) {
    // One pass: the largest so far, and the sum relative to it.
    float top = minus_infinity(), sum = 0;
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const Piece<W> p = load_piece<W>(x, row * n + i);
      float up = top;
#pragma unroll
      for (int j = 0; j < W; ++j) up = p.v[j] > up ? p.v[j] : up;
      if (up == minus_infinity()) continue;
      sum *= expf(top - up);
#pragma unroll
      for (int j = 0; j < W; ++j) sum += expf(p.v[j] - up);
      top = up;
    }
    const float all = team_max<kTeam>(top);
    sum = team_sum<kTeam>(top == minus_infinity() ? 0.0f : sum * expf(top - all));
    const float scale = 1.0f / sum;
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      Piece<W> p = load_piece<W>(x, row * n + i);
#pragma unroll
      for (int j = 0; j < W; ++j) p.v[j] = expf(p.v[j] - all) * scale;
      store_piece<W>(y, row * n + i, p);
    }
  });
}

template <int kTeam, int W>
__global__ void softmax_vjp_kernel(Operand dx, Operand y, Operand dy, int64_t rows, int64_t n) {
  for_each_team<kTeam>(rows, [&](int64_t row, int lane, bool valid) {
    float dot = 0;
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const auto a = fetch<W>(y, row * n + i), b = fetch<W>(dy, row * n + i);
      const Piece<W> p = expand<W>(a, y), d = expand<W>(b, dy);
#pragma unroll
      for (int j = 0; j < W; ++j) dot += p.v[j] * d.v[j];
    }
    dot = team_sum<kTeam>(dot);
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const auto a = fetch<W>(y, row * n + i), b = fetch<W>(dy, row * n + i);
      const Piece<W> p = expand<W>(a, y), d = expand<W>(b, dy);
      Piece<W> o;
#pragma unroll
      for (int j = 0; j < W; ++j) o.v[j] = p.v[j] * (d.v[j] - dot);
      store_piece<W>(dx, row * n + i, o);
    }
  });
}

}  // namespace

// ---- launchers ----

void softmax(Tensor& y, const Tensor& x) {
  const int64_t n = x.shape().back(), rows = rows_of(x);
  const Operand out = operand("softmax", y), in = operand("softmax", x);
  with_team(n, in_packs(n, out, in), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("softmax", y, softmax_kernel<kTeam, kW>, team_blocks<kTeam>(rows), kRowThreads, 0, out,
           in, rows, n / kW);
  });
}

void softmax_vjp(Tensor& dx, const Tensor& y, const Tensor& dy) {
  const int64_t n = y.shape().back(), rows = rows_of(y);
  const Operand out = operand("softmax_vjp", dx), py = operand("softmax_vjp", y),
                pd = operand("softmax_vjp", dy);
  with_team(n, in_packs(n, out, py, pd), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("softmax_vjp", y, softmax_vjp_kernel<kTeam, kW>, team_blocks<kTeam>(rows), kRowThreads,
           0, out, py, pd, rows, n / kW);
  });
}

}  // namespace omq::cuda
