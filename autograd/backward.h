// backward(): from a scalar loss to the gradient of every parameter it depends on.
#pragma once

#include <memory>
#include <unordered_map>

#include "autograd/node.h"

namespace omq {

// The gradients that backward() found, looked up by parameter. A value: nothing is stored on
// tensors, so there is nothing to reset between steps.
class Gradients {
 public:
  // Gradient of a tensor made by parameter(), same shape, contiguous. Throws Error when the loss
  // does not depend on it.
  const Tensor& operator[](const Tensor& parameter) const;
  bool contains(const Tensor& parameter) const;
  // Sums h into this: accumulation over micro-batches.
  void add(const Gradients& h);
  // Multiplies all: back from a scaled loss.
  void scale(double factor);

 private:
  friend Gradients backward(const Tensor& loss);
  std::unordered_map<const GradNode*, Tensor> of_;
  std::vector<std::shared_ptr<GradNode>>
      keep_;  // leaves stay alive, so that their addresses stay theirs
};

// loss: one element, F32 or F64, with history. Runs the recorded closures in reverse order of
// creation and frees each one right after; a second backward through the same history throws Error.
Gradients backward(const Tensor& loss);

}  // namespace omq
