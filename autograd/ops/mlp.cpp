// The gated activation of SwiGLU: silu(gate) ⊙ up, fused so that silu(gate) is never stored.
#include "autograd/ops.h"

namespace omq {

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  check(gate.shape() == up.shape(), "silu_mul: gate {} and up {} differ", gate.shape(), up.shape());
  const Tensor g = contiguous(gate), u = contiguous(up);
  Tensor y = empty_like(g);
  on(g).silu_mul(y, g, u);
  return record("silu_mul", y, {g, u}, [g = g.detach(), u = u.detach()](const Tensor& dy) -> Grads {
    Tensor dg = empty_like(g), du = empty_like(u);
    on(g).silu_mul_vjp(dg, du, g, u, contiguous(dy));
    return {dg, du};
  });
}

}  // namespace omq
