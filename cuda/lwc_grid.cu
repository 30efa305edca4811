// The grid of learnable weight clipping and its gradient, a group a thread.
//
// Bytes: forward u, l, hi, lo once, scale and zero once; backward those four and dscale once, two
// gradients once, four where the weight learns too.
#include "tensor/lwc_grid.h"

#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

struct Groups {
  const float *u, *l, *hi, *lo;
  int64_t n;
  float levels;
  bool include_zero;

  __device__ LwcGrid<float> at(int64_t i) const {
    return omq::lwc_grid(u[i], l[i], hi[i], lo[i], levels, include_zero);
  }
};

__global__ void lwc_grid_kernel(float* scale, float* zero, Groups s) {
  for (int64_t i = grid_index(); i < s.n; i += grid_stride()) {
    const LwcGrid<float> g = s.at(i);
    scale[i] = g.scale;
    zero[i] = g.zero;
  }
}

__global__ void lwc_grid_vjp_kernel(float* du, float* dl, float* dhi, float* dlo, Groups s,
                                    const float* dscale) {
  for (int64_t i = grid_index(); i < s.n; i += grid_stride()) {
    const LwcGrid<float> g = s.at(i);
    const float d = g.free_scale ? dscale[i] * (1.0f / s.levels) : 0.0f;
    du[i] = d * s.hi[i] * fn::Sigmoid{}.bwd(0.0f, g.gamma);
    dl[i] = -d * s.lo[i] * fn::Sigmoid{}.bwd(0.0f, g.beta);
    if (dhi) dhi[i] = d * g.gamma;
    if (dlo) dlo[i] = -d * g.beta;
  }
}

// ---- launchers ----

constexpr int kThreads = 256;

Groups groups_of(const Tensor& u, const Tensor& l, const Tensor& hi, const Tensor& lo,
                 const GroupSpec& s) {
  return {u.data<float>(),  l.data<float>(), hi.data<float>(),
          lo.data<float>(), u.numel(),       static_cast<float>(s.max_code()),
          s.include_zero};
}
float* wanted(const Tensor& x) { return x.defined() ? x.data<float>() : nullptr; }

}  // namespace

void lwc_grid(Tensor& scale, Tensor& zero, const Tensor& u, const Tensor& l, const Tensor& hi,
              const Tensor& lo, GroupSpec s) {
  launch("lwc_grid", u, lwc_grid_kernel, blocks_for(u.numel(), kThreads), kThreads, 0,
         scale.data<float>(), zero.data<float>(), groups_of(u, l, hi, lo, s));
}

void lwc_grid_vjp(Tensor& du, Tensor& dl, Tensor& dhi, Tensor& dlo, const Tensor& u,
                  const Tensor& l, const Tensor& hi, const Tensor& lo, const Tensor& dscale,
                  GroupSpec s) {
  launch("lwc_grid_vjp", u, lwc_grid_vjp_kernel, blocks_for(u.numel(), kThreads), kThreads, 0,
         du.data<float>(), dl.data<float>(), wanted(dhi), wanted(dlo), groups_of(u, l, hi, lo, s),
         dscale.data<float>());
}

}  // namespace omq::cuda
