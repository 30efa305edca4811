// Ops and their gradients against PyTorch: tests/golden/ops.safetensors (float64 results rounded to
// F32; see tests/golden/README.md).
#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/cases.h"
#include "tests/support/devices.h"
#include "tests/support/golden.h"

namespace omq {
namespace {

struct Row {
  std::string name;
  std::vector<std::string> inputs;  // those with a gradient
  std::function<Tensor(const Inputs&, const Golden&)> f;
};

Tensor golden_attention(const Inputs& in) {
  return attention(in[0], in[1], in[2],
                   {.scale = 1 / std::sqrt(static_cast<double>(in[0].dim(3)))});
}

Tensor from_start(const Tensor& x) {  // positions 0, 1, …
  std::vector<int32_t> at;
  for (int32_t t = 0; t < x.dim(1); ++t) at.push_back(t);
  return rope_at(x, at);
}

const std::vector<Row>& rows() {
  static const std::vector<Row> table = {
      {"rms_norm",
       {"x", "w"},
       [](const Inputs& in, const Golden&) { return rms_norm(in[0], in[1], {}, 1e-5); }},
      {"silu_mul",
       {"gate", "up"},
       [](const Inputs& in, const Golden&) { return silu_mul(in[0], in[1]); }},
      {"softmax", {"x"}, [](const Inputs& in, const Golden&) { return softmax(in[0]); }},
      {"rope", {"x"}, [](const Inputs& in, const Golden&) { return from_start(in[0]); }},
      {"attention",
       {"q", "k", "v"},
       [](const Inputs& in, const Golden&) { return golden_attention(in); }},
      {"rope_attention",
       {"q", "k", "v"},
       [](const Inputs& in, const Golden&) {
         return golden_attention({from_start(in[0]), from_start(in[1]), in[2]});
       }},
      {"cross_entropy",
       {"logits"},
       [](const Inputs& in, const Golden& g) {
         return reshape(mean(cross_entropy(in[0], like(g.at("cross_entropy.input.target"), in[0]))),
                        {});
       }},
      {"embedding",
       {"table"},
       [](const Inputs& in, const Golden& g) {
         return embedding(in[0], like(g.at("embedding.input.ids"), in[0]));
       }},
      {"linear",
       {"x", "w", "b"},
       [](const Inputs& in, const Golden&) { return linear(in[0], in[1], in[2]); }},
      {"gated_mlp",
       {"x", "norm", "gate", "up", "down"},
       [](const Inputs& in, const Golden&) {
         const Tensor h = rms_norm(in[0], in[1], {}, 1e-5);
         return in[0] + linear(silu_mul(linear(h, in[2]), linear(h, in[3])), in[4]);
       }},
  };
  return table;
}

// 2e-6 of the largest element in F32; in F64 what rounding the file to F32 leaves.
double tolerance(const Tensor& want, DType dtype) {
  double largest = 0;
  for (double v : values(want)) largest = std::max(largest, std::abs(v));
  return largest * (dtype == DType::F64 ? 1.2e-7 : 2e-6);
}

}  // namespace

TEST_CASE("ops agree with PyTorch, values and gradients") {
  const auto golden = load_golden("ops");
  if (!golden) {
    MESSAGE("skipped: no tests/golden/ops.safetensors");
    return;
  }
  for (Device d : test_devices())
    for (DType dtype : {DType::F32, DType::F64}) {
      if (dtype == DType::F64 && d.type != DeviceType::CPU) continue;
      for (const Row& row : rows()) {
        CAPTURE(d);
        CAPTURE(row.name);
        CAPTURE(dtype_name(dtype));
        const auto read = [&](const std::string& key) {
          return converted(golden->at(row.name + "." + key), dtype, d);
        };
        Inputs inputs;
        for (const std::string& name : row.inputs)
          inputs.push_back(parameter(read("input." + name)));
        const Tensor y = row.f(inputs, *golden), want = read("output.y");
        CHECK(within(y, want, tolerance(want, dtype)));
        const Gradients g = backward(sum(reshape(y, {-1}) * reshape(read("dy"), {-1})));
        for (size_t i = 0; i < inputs.size(); ++i) {
          CAPTURE(row.inputs[i]);
          const Tensor grad = read("grad." + row.inputs[i]);
          CHECK(within(g[inputs[i]], grad, tolerance(grad, dtype)));
        }
      }
    }
}

}  // namespace omq
