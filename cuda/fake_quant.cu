// Fake quantisation of a weight matrix by groups of a row, its straight-through gradient, and the
// codes themselves (spec omniquant §2.4, §2.6). Codes equal the CPU's bit for bit: the division is
// IEEE's, the rounding half to even.
//
// Bytes: forward x once, y once (half of that in BF16); backward x and dy once, dx once where it is
// wanted; grids are small. Forward and codes are one pack a thread; the gradient of a group's scale
// is a team's sum.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

struct Grid {
  const float *scale = nullptr, *zero = nullptr;  // [rows, groups]
  int64_t rows = 0, cols = 0, width = 0, groups = 0;
  float top = 0;              // largest code
  float first = 0, last = 0;  // gradient flows strictly between
};

__device__ inline float clamped(float t, float top) { return t < 0.0f ? 0.0f : t > top ? top : t; }
__device__ inline float code(float x, const Divisor& h, float z, float top) {
  return clamped(rintf(h.under(x)) + z, top);
}

// The group of piece i of the whole matrix.
template <int W> __device__ int64_t group_at(const Grid& s, int64_t i) {
  const int64_t pieces = s.cols / W, row = divide(i, pieces);
  if (s.groups == 1) return row;
  return row * s.groups + divide(i - row * pieces, s.width / W);
}

template <int W> __global__ void fake_quant_kernel(Operand y, Operand x, Grid s) {
  const int64_t count = s.rows * (s.cols / W);
  for (int64_t i = grid_index(); i < count; i += grid_stride()) {
    const auto raw = fetch<W>(x, i);
    const int64_t g = group_at<W>(s, i);
    const Divisor h(s.scale[g]);
    const float z = s.zero[g];
    Piece<W> p = expand<W>(raw, x);
#pragma unroll
    for (int j = 0; j < W; ++j) p.v[j] = (code(p.v[j], h, z, s.top) - z) * h.value;
    store_piece<W>(y, i, p);
  }
}

template <int W> __global__ void codes_kernel(uint8_t* codes, Operand x, Grid s) {
  const int64_t count = s.rows * (s.cols / W);
  for (int64_t i = grid_index(); i < count; i += grid_stride()) {
    const auto raw = fetch<W>(x, i);
    const int64_t g = group_at<W>(s, i);
    const Divisor h(s.scale[g]);
    const float z = s.zero[g];
    const Piece<W> p = expand<W>(raw, x);
    if constexpr (W == 1) {
      codes[i] = static_cast<uint8_t>(code(p.v[0], h, z, s.top));
    } else {
      uint32_t word[2] = {};
#pragma unroll
      for (int j = 0; j < W; ++j)
        word[j / 4] |= static_cast<uint32_t>(code(p.v[j], h, z, s.top)) << (j % 4 * 8);
      reinterpret_cast<uint2*>(codes)[i] = make_uint2(word[0], word[1]);
    }
  }
}

// dscale = Σ dy · [(q − z) − in · x/h], dx = in · dy, where `in` says that the code lies inside.
// Null outputs are not wanted.
template <int kTeam, int W>
__global__ void fake_quant_vjp_kernel(Operand dx, float* dscale, Operand x, Operand dy, Grid s) {
  for_each_team<kTeam>(s.rows * s.groups, [&](int64_t g, int lane, bool valid) {
    float total = 0;
    if (valid) {
      const int64_t row = divide(g, s.groups), column = (g - row * s.groups) * s.width;
      const int64_t begin = (row * s.cols + column) / W, n = min(s.width, s.cols - column) / W;
      const Divisor h(s.scale[g]);
      const float z = s.zero[g];
#pragma unroll 2
      for (int64_t i = lane; i < n; i += kTeam) {
        const auto a = fetch<W>(x, begin + i), b = fetch<W>(dy, begin + i);
        const Piece<W> p = expand<W>(a, x), d = expand<W>(b, dy);
        Piece<W> o;
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const float r = h.under(p.v[j]), t = rintf(r) + z;
          const bool inside = t > s.first && t < s.last;
          total += d.v[j] * ((clamped(t, s.top) - z) - (inside ? r : 0.0f));
          o.v[j] = inside ? d.v[j] : 0.0f;
        }
        if (dx.data) store_piece<W>(dx, begin + i, o);
      }
    }
    if (!dscale) return;
    total = team_sum<kTeam>(total);
    if (valid && lane == 0) dscale[g] = total;
  });
}

// The gradient of x where its own extremes make the grid; the second reading of x comes from the
// cache.
struct RangeGrads {
  const float *hi, *lo, *dhi, *dlo;  // [rows, groups]
};
template <int kTeam, int W>
__global__ void fake_quant_range_vjp_kernel(Operand dx, Operand x, Operand dy, Grid s,
                                            RangeGrads e) {
  for_each_team<kTeam>(s.rows * s.groups, [&](int64_t g, int lane, bool valid) {
    int64_t begin = 0, n = 0;
    float top = 0, bottom = 0;
    if (valid) {
      const int64_t row = divide(g, s.groups), column = (g - row * s.groups) * s.width;
      begin = (row * s.cols + column) / W;
      n = min(s.width, s.cols - column) / W;
      top = e.hi[g];
      bottom = e.lo[g];
    }
    int n_hi = 0, n_lo = 0;
#pragma unroll 2
    for (int64_t i = lane; i < n; i += kTeam) {
      const Piece<W> p = load_piece<W>(x, begin + i);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        n_hi += p.v[j] == top;
        n_lo += p.v[j] == bottom;
      }
    }
    n_hi = team_sum<kTeam>(n_hi);
    n_lo = team_sum<kTeam>(n_lo);
    const float share_hi = n_hi ? e.dhi[g] / static_cast<float>(n_hi) : 0.0f;
    const float share_lo = n_lo ? e.dlo[g] / static_cast<float>(n_lo) : 0.0f;
    const Divisor h(valid ? s.scale[g] : 1.0f);
    const float z = valid ? s.zero[g] : 0.0f;
#pragma unroll 2
    for (int64_t i = lane; i < n; i += kTeam) {
      const auto a = fetch<W>(x, begin + i), b = fetch<W>(dy, begin + i);
      const Piece<W> p = expand<W>(a, x), d = expand<W>(b, dy);
      Piece<W> o;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const float t = rintf(h.under(p.v[j])) + z;
        o.v[j] = (t > s.first && t < s.last ? d.v[j] : 0.0f) +
                 ((p.v[j] == top ? share_hi : 0.0f) + (p.v[j] == bottom ? share_lo : 0.0f));
      }
      store_piece<W>(dx, begin + i, o);
    }
  });
}

// ---- launchers ----

Grid grid_of(const Tensor& x, const Tensor& scale, const Tensor& zero, const GroupSpec& s) {
  const float top = static_cast<float>(s.max_code()), edge = s.end_codes_learn ? 0.5f : 0.0f;
  return {scale.data<float>(),
          zero.data<float>(),
          x.dim(0),
          x.dim(1),
          s.group_cols(x.dim(1)),
          s.groups(x.dim(1)),
          top,
          -edge,
          top + edge};
}
template <class... O> bool packs(const Grid& s, const O&... operands) {
  return s.width % kPack == 0 && in_packs(s.cols, operands...);
}
constexpr int kThreads = 256;

}  // namespace

void fake_quant(Tensor& y, const Tensor& x, const Tensor& scale, const Tensor& zero, GroupSpec s) {
  if (x.numel() == 0) return;
  const Grid grid = grid_of(x, scale, zero, s);
  const Operand out = operand("fake_quant", y), in = operand("fake_quant", x);
  if (packs(grid, out, in))
    launch("fake_quant", y, fake_quant_kernel<kPack>, blocks_for(x.numel() / kPack, kThreads),
           kThreads, 0, out, in, grid);
  else
    launch("fake_quant", y, fake_quant_kernel<1>, blocks_for(x.numel(), kThreads), kThreads, 0, out,
           in, grid);
}

void fake_quant_vjp(Tensor& dx, Tensor& dscale, const Tensor& x, const Tensor& scale,
                    const Tensor& zero, const Tensor& dy, GroupSpec s) {
  if (x.numel() == 0 || (!dx.defined() && !dscale.defined())) return;
  const Grid grid = grid_of(x, scale, zero, s);
  const Operand out = operand("fake_quant_vjp", dx), in = operand("fake_quant_vjp", x),
                grad = operand("fake_quant_vjp", dy);
  float* const ds = dscale.defined() ? dscale.data<float>() : nullptr;
  with_team(grid.width, packs(grid, out, in, grad), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("fake_quant_vjp", x, fake_quant_vjp_kernel<kTeam, kW>,
           team_blocks<kTeam>(grid.rows * grid.groups), kRowThreads, 0, out, ds, in, grad, grid);
  });
}

void fake_quant_range_vjp(Tensor& dx, const Tensor& x, const Tensor& scale, const Tensor& zero,
                          const Tensor& hi, const Tensor& lo, const Tensor& dhi, const Tensor& dlo,
                          const Tensor& dy, GroupSpec s) {
  if (x.numel() == 0) return;
  const char* const op = "fake_quant_range_vjp";
  const Grid grid = grid_of(x, scale, zero, s);
  const Operand out = operand(op, dx), in = operand(op, x), grad = operand(op, dy);
  const RangeGrads extremes{hi.data<float>(), lo.data<float>(), dhi.data<float>(),
                            dlo.data<float>()};
  with_team(grid.width, packs(grid, out, in, grad), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch(op, x, fake_quant_range_vjp_kernel<kTeam, kW>,
           team_blocks<kTeam>(grid.rows * grid.groups), kRowThreads, 0, out, in, grad, grid,
           extremes);
  });
}

void quantize_codes(Tensor& codes, const Tensor& x, const Tensor& scale, const Tensor& zero,
                    GroupSpec s) {
  if (x.numel() == 0) return;
  const Grid grid = grid_of(x, scale, zero, s);
  const Operand in = operand("quantize_codes", x);
  uint8_t* const out = codes.data<uint8_t>();
  if (packs(grid, in) && aligned16(out))
    launch("quantize_codes", x, codes_kernel<kPack>, blocks_for(x.numel() / kPack, kThreads),
           kThreads, 0, out, in, grid);
  else
    launch("quantize_codes", x, codes_kernel<1>, blocks_for(x.numel(), kThreads), kThreads, 0, out,
           in, grid);
}

}  // namespace omq::cuda
