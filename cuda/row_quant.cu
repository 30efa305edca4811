// Fake quantisation of every row on its own range, and its straight-through gradient (spec
// omniquant §2.6): x̂ depends on x directly and through the row's extremes. The grid is that of
// tensor/row_quant.h, so codes equal the CPU's bit for bit.
//
// Bytes: forward x once, y once; backward x and dy once, dx once (further readings of a row come
// from the cache). A row is a team's.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

struct Extremes {
  float hi, lo;
};

template <int kTeam, int W>
__device__ Extremes extremes(Operand x, int64_t row, int64_t n, int lane, bool valid) {
  float top = valid ? load(x, row * n * W) : 0.0f, bottom = -top;  // bottom: the largest of −x
  for (int64_t i = lane; valid && i < n; i += kTeam) {
    const Piece<W> p = load_piece<W>(x, row * n + i);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      top = p.v[j] > top ? p.v[j] : top;
      bottom = -p.v[j] > bottom ? -p.v[j] : bottom;
    }
  }
  top = team_max<kTeam>(top);
  bottom = team_max<kTeam>(bottom);
  return {top, -bottom};
}

template <int kTeam, int W>
__global__ void fake_quant_rows_kernel(Operand y, Operand x, int64_t rows, int64_t n, RowQuant s) {
  const float top = static_cast<float>((1 << s.bits) - 1);
  for_each_team<kTeam>(rows, [&](int64_t row, int lane, bool valid) {
    const Extremes e = extremes<kTeam, W>(x, row, n, lane, valid);
    const RowGrid<float> g = row_grid(e.hi, e.lo, s);
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      Piece<W> p = load_piece<W>(x, row * n + i);
#pragma unroll
      for (int j = 0; j < W; ++j) p.v[j] = (row_code(p.v[j], g, top) - g.zero) * g.scale;
      store_piece<W>(y, row * n + i, p);
    }
  });
}

// With S = Σ dy · [(q − z) − in · x/h]: dx = in · dy + S·clip/(2ᵇ−1) · (share of the maxima − share
// of the minima).
template <int kTeam, int W>
__global__ void fake_quant_rows_vjp_kernel(Operand dx, Operand x, Operand dy, int64_t rows,
                                           int64_t n, RowQuant s) {
  const float top = static_cast<float>((1 << s.bits) - 1);
  const float first = s.end_codes_learn ? -0.5f : 0.0f, last = top - first;
  const auto in_range = [&](float t) { return t > first && t < last; };
  for_each_team<kTeam>(rows, [&](int64_t row, int lane, bool valid) {
    const Extremes e = extremes<kTeam, W>(x, row, n, lane, valid);
    const RowGrid<float> g = row_grid(e.hi, e.lo, s);
    const float hi = s.include_zero && !(e.hi > 0.0f) ? 0.0f : e.hi,
                lo = s.include_zero && !(e.lo < 0.0f) ? 0.0f : e.lo;
    float total = 0;
    int n_hi = 0, n_lo = 0;
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const auto a = fetch<W>(x, row * n + i), b = fetch<W>(dy, row * n + i);
      const Piece<W> p = expand<W>(a, x), d = expand<W>(b, dy);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const float r = p.v[j] / g.scale, t = rintf(r) + g.zero;
        const float q = t < 0.0f ? 0.0f : t > top ? top : t;
        total += d.v[j] * ((q - g.zero) - (in_range(t) ? r : 0.0f));
        n_hi += p.v[j] == hi;
        n_lo += p.v[j] == lo;
      }
    }
    total = team_sum<kTeam>(total);
    n_hi = team_sum<kTeam>(n_hi);
    n_lo = team_sum<kTeam>(n_lo);
    const float end = total * static_cast<float>(s.clip) / top;
    const float up = g.free_scale && n_hi ? end / static_cast<float>(n_hi) : 0.0f;
    const float down = g.free_scale && n_lo ? end / static_cast<float>(n_lo) : 0.0f;
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const auto a = fetch<W>(x, row * n + i), b = fetch<W>(dy, row * n + i);
      const Piece<W> p = expand<W>(a, x), d = expand<W>(b, dy);
      Piece<W> o;
#pragma unroll
      for (int j = 0; j < W; ++j)
        o.v[j] = (in_range(rintf(p.v[j] / g.scale) + g.zero) ? d.v[j] : 0.0f) +
                 ((p.v[j] == hi ? up : 0.0f) - (p.v[j] == lo ? down : 0.0f));
      store_piece<W>(dx, row * n + i, o);
    }
  });
}

}  // namespace

// ---- launchers ----

void fake_quant_rows(Tensor& y, const Tensor& x, RowQuant s) {
  const int64_t n = x.shape().back(), rows = rows_of(x);
  const Operand out = operand("fake_quant_rows", y), in = operand("fake_quant_rows", x);
  with_team(n, in_packs(n, out, in), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("fake_quant_rows", y, fake_quant_rows_kernel<kTeam, kW>, team_blocks<kTeam>(rows),
           kRowThreads, 0, out, in, rows, n / kW, s);
  });
}

void fake_quant_rows_vjp(Tensor& dx, const Tensor& x, const Tensor& dy, RowQuant s) {
  const int64_t n = x.shape().back(), rows = rows_of(x);
  const Operand out = operand("fake_quant_rows_vjp", dx), in = operand("fake_quant_rows_vjp", x),
                grad = operand("fake_quant_rows_vjp", dy);
  with_team(n, in_packs(n, out, in, grad), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("fake_quant_rows_vjp", x, fake_quant_rows_vjp_kernel<kTeam, kW>,
           team_blocks<kTeam>(rows), kRowThreads, 0, out, in, grad, rows, n / kW, s);
  });
}

}  // namespace omq::cuda
