// Every op of tests/support/cases.h on three rungs of the ladder: backward() in F64 against
// differences, F32 against F64 on each device, and fused against composed.
#include <doctest/doctest.h>

#include "autograd/backward.h"
#include "tests/support/cases.h"
#include "tests/support/devices.h"
#include "tests/support/gradcheck.h"

namespace omq {
namespace {

struct Outcome {
  Tensor y;
  Inputs grads;
};

// y and the gradients of Σ v ⊙ y, v being the same random numbers for every dtype and device.
Outcome outcome(const TensorFunction& f, const Inputs& exact, DType dtype, Device device) {
  Inputs leaves;
  for (const Tensor& x : exact) leaves.push_back(parameter(converted(x, dtype, device)));
  Outcome out;
  out.y = f(leaves);
  Rng rng(11);
  const Gradients g =
      backward(sum(out.y * converted(random_tensor(rng, out.y.shape()), dtype, device)));
  for (const Tensor& x : leaves) out.grads.push_back(g[x]);
  return out;
}

}  // namespace

TEST_CASE("backward agrees with differences, op by op") {
  for (const OpCase& c : op_cases()) {
    if (c.straight_through) continue;
    CAPTURE(c.name);
    CHECK(gradcheck(c.f, case_inputs(c)));
  }
}

TEST_CASE("F32 agrees with F64, op by op and device by device") {
  for (Device d : test_devices())
    for (const OpCase& c : op_cases()) {
      CAPTURE(d);
      CAPTURE(c.name);
      const Inputs inputs = case_inputs(c, 5);
      const Outcome want = outcome(c.f, inputs, DType::F64, {}),
                    got = outcome(c.f, inputs, DType::F32, d);
      CHECK(close(got.y, want.y, c.nmse));
      for (size_t i = 0; i < inputs.size(); ++i) {
        CAPTURE(i);
        CHECK(close(got.grads[i], want.grads[i], c.nmse));
      }
    }
}

TEST_CASE("fused ops equal their compositions, values and gradients") {
  for (const OpCase& c : op_cases()) {
    if (!c.composed) continue;
    CAPTURE(c.name);
    const Inputs inputs = case_inputs(c, 6);
    const Outcome fused = outcome(c.f, inputs, DType::F64, {}),
                  plain = outcome(c.composed, inputs, DType::F64, {});
    CHECK(close(fused.y, plain.y, 1e-28));
    for (size_t i = 0; i < inputs.size(); ++i) {
      CAPTURE(i);
      CHECK(close(fused.grads[i], plain.grads[i], 1e-26));
    }
  }
}

TEST_CASE("inputs that are constants cost nothing and change nothing") {
  Rng rng(1);
  const Tensor x = random_tensor(rng, {3, 4}), w = random_tensor(rng, {5, 4});
  CHECK(linear(x, w).node() == nullptr);
  const Tensor p = parameter(x);
  const Gradients g = backward(sum(linear(p, w)));
  CHECK(g.contains(p));
  CHECK_FALSE(g.contains(w));
}

}  // namespace omq
