// Reverse-mode automatic differentiation, first order: how an op leaves its history, and how a
// scope says "none".
//
// A GradNode is one op that ran: where its inputs came from, and a closure that turns the gradient
// of its output into the gradients of its inputs. Closures hold detached tensors only, so history
// never forms a cycle. See backward.h.
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <vector>

#include "tensor/tensor.h"

namespace omq {

using Grads = std::vector<Tensor>;  // one per input; an undefined Tensor means "no gradient"
using Vjp = std::function<Grads(const Tensor& dy)>;  // dy: gradient of the loss in the op's output

struct GradNode {
  uint64_t id = 0;  // creation number: an op's inputs always have smaller ones
  std::string_view op;
  std::vector<std::shared_ptr<GradNode>> inputs;  // null: that input is a constant
  Vjp vjp;                                        // empty for a leaf, or once it ran
  Shape shape;                                    // of the op's output

  GradNode() = default;
  GradNode(const GradNode&) = delete;
  GradNode& operator=(const GradNode&) = delete;
  ~GradNode();  // releases long chains without recursion
};

// Attaches history to y: it came from `inputs` by the op named `op` (a literal). No history is kept
// when no input needs a gradient or under NoGrad. Returns y.
Tensor record(std::string_view op, Tensor y, std::initializer_list<Tensor> inputs, Vjp vjp);

// t as a leaf to differentiate (shares the Storage). Everything else is a constant.
Tensor parameter(const Tensor& t);

// Whether an op on t has to keep what its gradient needs.
bool needs_grad(const Tensor& t);

// While one lives, ops of this thread record nothing.
class [[nodiscard]] NoGrad {
 public:
  NoGrad();
  ~NoGrad();
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

}  // namespace omq
