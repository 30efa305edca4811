// gradcheck(): what backward() says against central differences in F64, for every element of every
// input.
//
// The op f is reduced to the number L = Σ v ⊙ f(inputs) with a fixed random v, so dL/dx = Jᵀv, and
// an error anywhere in the Jacobian shows. The same differences are compared with backward() in
// several arrangements that must not matter: inputs as they are or as strided views, v handed down
// row-major or strided, and every input alone being a parameter.
//
//   CHECK(gradcheck([](const auto& in) { return softmax(in[0]); }, {x}));
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq {

using TensorFunction = std::function<Tensor(const std::vector<Tensor>&)>;

struct GradcheckOptions {
  double step = 1e-5,
         tolerance = 2e-7;  // tolerance: of the largest element of the gradient, at least of 1
  uint64_t seed = 7;
};

namespace detail {

inline Tensor weighted_sum(const Tensor& y, const Tensor& v, bool strided) {
  if (strided && y.ndim() >= 2) return sum(mul(transpose(y, 0, -1), transpose(v, 0, -1)));
  return sum(mul(y, v));
}

// Element `at` of x (contiguous) moved by `by`.
inline Tensor nudged(const Tensor& x, int64_t at, double by) {
  Tensor y = converted(x, DType::F64);
  y.data<double>()[at] += by;
  return y;
}

struct Arrangement {
  bool strided_inputs = false, strided_cotangent = false;
  int only = -1;  // this input alone is a parameter
  std::string text() const {
    return fmt::format("{}{}{}", strided_inputs ? " strided inputs" : "",
                       strided_cotangent ? " strided cotangent" : "",
                       only >= 0 ? fmt::format(" input {} alone", only) : "");
  }
};

// Gradients of L; undefined where an input is not a parameter or L does not depend on it.
inline std::vector<Tensor> backward_of(const TensorFunction& f, const std::vector<Tensor>& inputs,
                                       const Tensor& v, const Arrangement& how) {
  std::vector<Tensor> leaves, seen;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool flip = how.strided_inputs && inputs[i].ndim() >= 2;
    Tensor x = flip ? converted(transpose(inputs[i], 0, -1), DType::F64) : inputs[i].detach();
    if (how.only < 0 || how.only == static_cast<int>(i)) x = parameter(x);
    leaves.push_back(x);
    seen.push_back(flip ? transpose(x, 0, -1) : x);
  }
  const Tensor loss = weighted_sum(f(seen), v, how.strided_cotangent);
  std::vector<Tensor> out(inputs.size());
  if (!loss.node()) return out;
  const Gradients g = backward(loss);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!leaves[i].node() || !g.contains(leaves[i])) continue;
    const bool flip = how.strided_inputs && inputs[i].ndim() >= 2;
    out[i] = flip ? transpose(g[leaves[i]], 0, -1) : g[leaves[i]];
  }
  return out;
}

}  // namespace detail

// inputs: F64. Inputs that f does not depend on must have a gradient of zero by differences too.
inline Closeness gradcheck(const TensorFunction& f, std::vector<Tensor> inputs,
                           GradcheckOptions options = {}) {
  for (Tensor& x : inputs) x = converted(x, DType::F64);
  Rng rng(options.seed);
  Tensor v;
  {
    NoGrad off;
    v = random_tensor(rng, f(inputs).shape(), DType::F64, 0.5, 1.5);
    for (int64_t i = 0; i < v.numel(); ++i) v.data<double>()[i] *= rng.coin() ? 1 : -1;
  }
  std::vector<Tensor> numeric;
  for (size_t i = 0; i < inputs.size(); ++i) {
    NoGrad off;
    Tensor d = Tensor::zeros(inputs[i].shape(), DType::F64);
    std::vector<Tensor> moved = inputs;
    for (int64_t at = 0; at < d.numel(); ++at) {
      double loss[2];
      for (int side = 0; side < 2; ++side) {
        moved[i] = detail::nudged(inputs[i], at, side ? options.step : -options.step);
        loss[side] = detail::weighted_sum(f(moved), v, false).item<double>();
      }
      d.data<double>()[at] = (loss[1] - loss[0]) / (2 * options.step);
    }
    numeric.push_back(d);
  }
  std::vector<detail::Arrangement> ways{
      {false, false, -1}, {false, true, -1}, {true, false, -1}, {true, true, -1}};
  if (inputs.size() > 1)
    for (size_t i = 0; i < inputs.size(); ++i) ways.push_back({false, false, static_cast<int>(i)});
  for (const detail::Arrangement& how : ways) {
    const std::vector<Tensor> exact = detail::backward_of(f, inputs, v, how);
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (how.only >= 0 && how.only != static_cast<int>(i)) continue;
      const Tensor g = exact[i].defined() ? exact[i] : Tensor::zeros(inputs[i].shape(), DType::F64);
      double largest = 1;
      for (double x : values(numeric[i])) largest = std::max(largest, std::abs(x));
      const Closeness same = within(g, numeric[i], options.tolerance * largest);
      if (!same)
        return {false, fmt::format("gradient of input {}{}: {}", i, how.text(), same.what)};
    }
  }
  return {true, "gradients agree"};
}

}  // namespace omq
