// StepGraph on every device: what is replayed is what the body does.
#include "tensor/step_graph.h"

#include <doctest/doctest.h>

#include "tensor/kernels.h"
#include "tests/support/devices.h"

namespace omq {

TEST_CASE("devices: a recorded step reads its inputs anew and keeps its sums") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    Tensor x = Tensor::zeros({1000}, DType::F32, d), total = Tensor::zeros({1000}, DType::F32, d);
    int calls = 0;
    StepGraph step(d, [&] {
      ++calls;
      Tensor squared = empty_like(x), sum = empty_like(x);  // allocated and freed inside
      on(x).binary(squared, x, x, Binary::Mul);
      on(x).binary(sum, total, squared, Binary::Add);
      on(total).copy(total, sum);
    });
    double want = 0;
    for (int i = 1; i <= 6; ++i) {
      on(x).fill(x, i);
      step.run();
      want += i * i;
      const std::vector<float> got = total.to_vector<float>();
      CHECK(got.front() == want);
      CHECK(got.back() == want);
    }
    CHECK(calls == (d.type == DeviceType::CPU ? 6 : 2));
  }
}

TEST_CASE("devices: an error while a step is recorded leaves the device usable") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    int calls = 0;
    StepGraph step(d, [&] {
      Tensor::zeros({10}, DType::F32, d);
      if (++calls == 2) fail("on purpose");
    });
    step.run();
    CHECK_THROWS_WITH_AS(step.run(), "on purpose", Error);
    CHECK(Tensor::full({4}, 3, DType::F32, d).to_vector<float>()[3] == 3);
  }
}

}  // namespace omq
