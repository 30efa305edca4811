// The inverse of a unit triangular matrix, from products alone: exact, of a fixed number of steps,
// and without a decision that would have to be read back from a device.
#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq {

// (I − M)⁻¹ = Σ Mⁱ = (I + M)·(I + M²)·(I + M⁴)…, up to Mⁿ = 0.
Tensor unit_triangular_inverse(const Tensor& n) {
  check(n.ndim() >= 2 && n.dim(-1) == n.dim(-2),
        "unit_triangular_inverse: square matrices wanted, got {}", n.shape());
  const ComputeScope exact(Compute::F32);
  Tensor x;
  {
    NoGrad off;
    Tensor power = -contiguous(n.detach());
    const int64_t size = n.dim(-1);
    Tensor one = Tensor::zeros({size, size}, n.dtype(), n.device());
    Tensor diagonal = one.alias({size}, {size + 1}, 0);
    on(one).fill(diagonal, 1);
    x = power + one;
    for (int64_t reached = 2; reached < size; reached *= 2) {
      power = matmul(power, power);
      x = x + matmul(x, power);
    }
  }
  return record("unit_triangular_inverse", x, {n}, [x = x.detach()](const Tensor& dy) -> Grads {
    const ComputeScope wide(Compute::F32);
    const int last = x.ndim() - 1;
    const Tensor t = transpose(x, last - 1, last);
    return {-matmul(matmul(t, dy), t)};
  });
}

}  // namespace omq
