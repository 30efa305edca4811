// silu(gate) ⊙ up and its gradients, and the AdamW step: one pack a thread.
//
// Bytes: silu_mul two in, one out; its gradient three in, two out; AdamW four in, three out.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

template <int W> __global__ void silu_mul_kernel(Operand y, Operand gate, Operand up, int64_t n) {
  for (int64_t i = grid_index(); i < n; i += grid_stride()) {
    const auto a = fetch<W>(gate, i), b = fetch<W>(up, i);
    const Piece<W> g = expand<W>(a, gate), u = expand<W>(b, up);
    Piece<W> o;
#pragma unroll
    for (int j = 0; j < W; ++j) o.v[j] = fn::Silu{}.fwd(g.v[j]) * u.v[j];
    store_piece<W>(y, i, o);
  }
}

template <int W>
__global__ void silu_mul_vjp_kernel(Operand dgate, Operand dup, Operand gate, Operand up,
                                    Operand dy, int64_t n) {
  for (int64_t i = grid_index(); i < n; i += grid_stride()) {
    const auto a = fetch<W>(gate, i), b = fetch<W>(up, i), c = fetch<W>(dy, i);
    const Piece<W> g = expand<W>(a, gate), u = expand<W>(b, up), d = expand<W>(c, dy);
    Piece<W> og, ou;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float s = 1.0f / (1.0f + expf(-g.v[j]));
      og.v[j] = d.v[j] * u.v[j] * (s * (1.0f + g.v[j] * (1.0f - s)));
      ou.v[j] = d.v[j] * (g.v[j] * s);
    }
    store_piece<W>(dgate, i, og);
    store_piece<W>(dup, i, ou);
  }
}

struct Step {
  float b1, b2, one_less_b1, one_less_b2, eps, decay, lr;
};

__global__ void adamw_tick_kernel(float* clock, const float* loss, double beta1, double beta2,
                                  RateSchedule rate) {
  if (loss && !isfinite(*loss)) clock[1] = clock[2] = INFINITY;
  if (isinf(clock[1])) return;
  const double t = static_cast<double>(clock[0]) + 1;
  clock[0] = static_cast<float>(t);
  clock[1] = static_cast<float>(1 - pow(beta1, t));
  clock[2] = static_cast<float>(1 - pow(beta2, t));
  clock[3] = static_cast<float>(rate.share(t));
}

template <int W>
__global__ void adamw_kernel(Operand p, Operand m, Operand v, Operand g, const float* clock, Step s,
                             int64_t n) {
  if (isinf(clock[1])) return;
  const float step = s.lr * clock[3] / clock[1], root = 1.0f / sqrtf(clock[2]);
  const float keep = 1.0f - s.decay * clock[3];
  for (int64_t i = grid_index(); i < n; i += grid_stride()) {
    const auto rp = fetch<W>(p, i), rm = fetch<W>(m, i), rv = fetch<W>(v, i), rg = fetch<W>(g, i);
    Piece<W> x = expand<W>(rp, p), a = expand<W>(rm, m), b = expand<W>(rv, v);
    const Piece<W> d = expand<W>(rg, g);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      a.v[j] = s.b1 * a.v[j] + s.one_less_b1 * d.v[j];
      b.v[j] = s.b2 * b.v[j] + s.one_less_b2 * d.v[j] * d.v[j];
      x.v[j] = keep * x.v[j] - step * a.v[j] / (sqrtf(b.v[j]) * root + s.eps);
    }
    store_piece<W>(p, i, x);
    store_piece<W>(m, i, a);
    store_piece<W>(v, i, b);
  }
}

constexpr int kThreads = 256;

}  // namespace

// ---- launchers ----

void silu_mul(Tensor& y, const Tensor& gate, const Tensor& up) {
  const int64_t n = y.numel();
  const Operand out = operand("silu_mul", y), g = operand("silu_mul", gate),
                u = operand("silu_mul", up);
  with_width(in_packs(n, out, g, u), [&](auto width) {
    constexpr int kW = decltype(width)::value;
    launch("silu_mul", y, silu_mul_kernel<kW>, blocks_for(n / kW, kThreads), kThreads, 0, out, g, u,
           n / kW);
  });
}

void silu_mul_vjp(Tensor& dgate, Tensor& dup, const Tensor& gate, const Tensor& up,
                  const Tensor& dy) {
  const int64_t n = gate.numel();
  const Operand og = operand("silu_mul_vjp", dgate), ou = operand("silu_mul_vjp", dup),
                g = operand("silu_mul_vjp", gate), u = operand("silu_mul_vjp", up),
                d = operand("silu_mul_vjp", dy);
  with_width(in_packs(n, og, ou, g, u, d), [&](auto width) {
    constexpr int kW = decltype(width)::value;
    launch("silu_mul_vjp", gate, silu_mul_vjp_kernel<kW>, blocks_for(n / kW, kThreads), kThreads, 0,
           og, ou, g, u, d, n / kW);
  });
}

void adamw_tick(Tensor& clock, const Tensor& loss, AdamWStep s) {
  launch("adamw_tick", clock, adamw_tick_kernel, 1, 1, 0, clock.data<float>(),
         loss.defined() ? loss.data<float>() : nullptr, s.beta1, s.beta2, s.rate);
}

void adamw(Tensor& p, Tensor& m, Tensor& v, const Tensor& g, const Tensor& clock, AdamWStep s) {
  const int64_t n = p.numel();
  const Operand op = operand("adamw", p), om = operand("adamw", m), ov = operand("adamw", v),
                og = operand("adamw", g);
  const float b1 = static_cast<float>(s.beta1), b2 = static_cast<float>(s.beta2);
  const Step step{b1,
                  b2,
                  1.0f - b1,
                  1.0f - b2,
                  static_cast<float>(s.eps),
                  static_cast<float>(s.lr * s.weight_decay),
                  static_cast<float>(s.lr)};
  with_width(in_packs(n, op, om, ov, og), [&](auto width) {
    constexpr int kW = decltype(width)::value;
    launch("adamw", p, adamw_kernel<kW>, blocks_for(n / kW, kThreads), kThreads, 0, op, om, ov, og,
           clock.data<float>(), step, n / kW);
  });
}

}  // namespace omq::cuda
