// Norm Tweaking (methods/norm_tweaking.cpp): its loss, that codes stay GPTQ's, and that only norms
// learn, faster in deeper blocks.
#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "tests/quant/runs.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

TEST_CASE("norm tweaking: codes are gptq's, norms are not") {
  const Run tweaked(quick_recipe("norm-tweaking")), solved(quick_recipe("gptq"));
  const auto a = tweaked.packed.blocks[0]->linears(), b = solved.packed.blocks[0]->linears();
  for (size_t i = 0; i < a.size(); ++i)
    CHECK(bit_equal(packed_of(*a[i].linear).data, packed_of(*b[i].linear).data));
  const Tensor norm = tweaked.packed_block(0).post_attention_layernorm.weight;
  CHECK_FALSE(bit_equal(norm, solved.packed_block(0).post_attention_layernorm.weight));
  CHECK(bit_equal(norm, tweaked.simulated_block(0).post_attention_layernorm.weight));
}

TEST_CASE("norm tweaking: the loss is that of channel means and variances") {
  const Tensor y = Tensor::from<float>({1, 2, 3, 4, 5, 9}, {1, 3, 2}),
               t = Tensor::from<float>({0, 2, 0, 2, 3, 2}, {1, 3, 2});
  // Means 3, 5 and 1, 2; variances 8/3, 26/3 and 2, 0.
  const double want = (2 + 8.0 / 3 - 2 + 3 + 26.0 / 3) / 2;
  const Tensor loss = channel_statistics().loss(y, {t, {}});
  CHECK(loss.item<float>() == doctest::Approx(want).epsilon(1e-6));
}

TEST_CASE("norm tweaking: deeper blocks learn faster") {
  Recipe r = quick_recipe("norm-tweaking", 2, 1);
  r.train.batch_size = 8;  // one step, which moves every gain by its rate
  r.train.lr["norms"] = 1e-2;
  r.train.depth_slope = 3;
  const Run run(r), plain(quick_recipe("gptq"));
  for (const size_t i : {0, 1}) {
    const std::vector<double> share = values(run.packed_block(i).input_layernorm.weight /
                                             plain.packed_block(i).input_layernorm.weight);
    for (const double s : share)
      CHECK(std::abs(s - 1) == doctest::Approx(i == 0 ? 0.01 : 0.025).epsilon(1e-2));
  }
}

}  // namespace
}  // namespace omq::quant
