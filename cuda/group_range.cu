// Largest and smallest element of every group of a row, and the gradient, which the elements that
// are the extreme share.
//
// Bytes: forward x once; backward x once (the second reading comes from the cache), dx once. A
// group is a team's.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

struct Groups {
  int64_t rows = 0, cols = 0, width = 0, groups = 0;  // groups of a row
  int64_t row_step = 0, col_step = 0;                 // of x, elements
};

// Where group g of all starts in x and in a contiguous matrix, and its columns.
struct Place {
  int64_t x, dense, n;
};
__device__ inline Place place(const Groups& s, int64_t g) {
  const int64_t row = divide(g, s.groups), first = (g - row * s.groups) * s.width;
  return {row * s.row_step + first * s.col_step, row * s.cols + first,
          min(s.width, s.cols - first)};
}

// Element or pack i of a group; packs only where the columns are contiguous.
template <int W>
__device__ Piece<W> group_piece(Operand x, const Groups& s, const Place& at, int64_t i) {
  if constexpr (W == 1)
    return load_piece<1>(x, at.x + i * s.col_step);
  else
    return load_piece<W>(x, at.x / W + i);
}

template <int kTeam, int W>
__global__ void group_range_kernel(float* hi, float* lo, Operand x, Groups s, bool include_zero) {
  for_each_team<kTeam>(s.rows * s.groups, [&](int64_t g, int lane, bool valid) {
    float top = 0, bottom = 0;  // bottom: the largest of −x, as on the CPU
    if (valid) {
      const Place at = place(s, g);
      if (!include_zero) {
        top = load(x, at.x);
        bottom = -top;
      }
#pragma unroll 2
      for (int64_t i = lane; i < at.n / W; i += kTeam) {
        const Piece<W> p = group_piece<W>(x, s, at, i);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          top = p.v[j] > top ? p.v[j] : top;
          bottom = -p.v[j] > bottom ? -p.v[j] : bottom;
        }
      }
    }
    top = team_max<kTeam>(top);
    bottom = team_max<kTeam>(bottom);
    if (valid && lane == 0) {
      hi[g] = top;
      lo[g] = -bottom;
    }
  });
}

template <int kTeam, int W>
__global__ void group_range_vjp_kernel(Operand dx, Operand x, const float* hi, const float* lo,
                                       const float* dhi, const float* dlo, Groups s) {
  for_each_team<kTeam>(s.rows * s.groups, [&](int64_t g, int lane, bool valid) {
    const Place at = valid ? place(s, g) : Place{0, 0, 0};
    const float top = valid ? hi[g] : 0, bottom = valid ? lo[g] : 0;
    int n_hi = 0, n_lo = 0;
    for (int64_t i = lane; i < at.n / W; i += kTeam) {
      const Piece<W> p = group_piece<W>(x, s, at, i);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        n_hi += p.v[j] == top;
        n_lo += p.v[j] == bottom;
      }
    }
    n_hi = team_sum<kTeam>(n_hi);
    n_lo = team_sum<kTeam>(n_lo);
    const float share_hi = n_hi ? dhi[g] / static_cast<float>(n_hi) : 0.0f;
    const float share_lo = n_lo ? dlo[g] / static_cast<float>(n_lo) : 0.0f;
    for (int64_t i = lane; i < at.n / W; i += kTeam) {
      Piece<W> p = group_piece<W>(x, s, at, i);
#pragma unroll
      for (int j = 0; j < W; ++j)
        p.v[j] = (p.v[j] == top ? share_hi : 0.0f) + (p.v[j] == bottom ? share_lo : 0.0f);
      store_piece<W>(dx, at.dense / W + i, p);
    }
  });
}

// ---- launchers ----

Groups groups_of(const Tensor& x, const GroupSpec& s) {
  return {x.dim(0), x.dim(1), s.group_cols(x.dim(1)), s.groups(x.dim(1)), x.stride(0), x.stride(1)};
}
bool in_packs(const Groups& s, Operand x, Operand dense) {
  return s.col_step == 1 && s.row_step % kPack == 0 && s.width % kPack == 0 &&
         cuda::in_packs(s.cols, x, dense);
}

}  // namespace

void group_range(Tensor& hi, Tensor& lo, const Tensor& x, GroupSpec spec) {
  if (x.numel() == 0) return;
  const Groups s = groups_of(x, spec);
  const Operand in = operand("group_range", x);
  with_team(s.width, in_packs(s, in, {}), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("group_range", x, group_range_kernel<kTeam, kW>, team_blocks<kTeam>(s.rows * s.groups),
           kRowThreads, 0, hi.data<float>(), lo.data<float>(), in, s, spec.include_zero);
  });
}

void group_range_vjp(Tensor& dx, const Tensor& x, const Tensor& hi, const Tensor& lo,
                     const Tensor& dhi, const Tensor& dlo, GroupSpec spec) {
  if (x.numel() == 0) return;
  const Groups s = groups_of(x, spec);
  const Operand in = operand("group_range_vjp", x), out = operand("group_range_vjp", dx);
  with_team(s.width, in_packs(s, in, out), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("group_range_vjp", x, group_range_vjp_kernel<kTeam, kW>,
           team_blocks<kTeam>(s.rows * s.groups), kRowThreads, 0, out, in, hi.data<float>(),
           lo.data<float>(), dhi.data<float>(), dlo.data<float>(), s);
  });
}

}  // namespace omq::cuda
