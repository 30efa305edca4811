// What an embedder's first program looks like: make tensors, multiply them, read an error. Uses
// installed headers only.
#include <cmath>
#include <cstdio>

#include "tensor/kernels.h"
#include "tensor/tensor.h"

int main() {
  using omq::Tensor;
  const Tensor a = Tensor::from<float>({1, 2, 3, 4, 5, 6}, {2, 3});
  const Tensor b = Tensor::from<float>({1, 0, 0, 1, 1, 1}, {3, 2});
  Tensor y = Tensor::zeros({2, 2});
  omq::on(a).matmul(y, a, b);

  Tensor total = Tensor::zeros({1, 1});
  omq::on(y).sum_to(total, y);
  const float sum = total.item<float>();
  std::printf("sum %g\n", static_cast<double>(sum));
  if (std::fabs(sum - 30.0f) > 1e-5f) return 1;

  try {
    a.data<double>();
  } catch (const omq::Error& e) {
    std::printf("error: %s\n", e.what());
    return 0;
  }
  return 1;
}
