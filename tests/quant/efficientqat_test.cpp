// EfficientQAT's block phase: weights, grids and norms learn, the best epoch is kept, and what is
// committed is what was learned.
#include <doctest/doctest.h>

#include <cmath>
#include <map>

#include "autograd/ops.h"
#include "tests/quant/runs.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

TEST_CASE("efficientqat: everything learns, and the loss of the last step is what is committed") {
  const Recipe recipe = quick_recipe("efficientqat");
  Rng rng(3);
  LlamaBlock fp = random_block(rng);
  const BlockMethod method(recipe, fp);
  std::map<std::string, int> groups;
  for (const nn::ParamGroup& g : method.param_groups())
    groups[g.name] += static_cast<int>(g.params.size());
  CHECK(groups == std::map<std::string, int>{{"weights", 7}, {"grid", 14}, {"norms", 2}});
  CHECK(method.learnables().front().name == "self_attn.q_proj.grid.step");
  CHECK(method.learnables().back().name == "post_attention_layernorm.norms.gain");

  // One step by hand moves all of them, and none of the block's own tensors.
  const nn::Positions at = nn::positions(0, 6, small_rope(6));
  const Tensor x = normal_tensor(rng, {1, 6, kHidden}, DType::F32);
  Targets target;
  {
    NoGrad off;
    target.of_fp = fp.forward(x, at, nullptr);
  }
  std::vector<std::vector<float>> then;
  for (const Learnable& l : method.learnables()) then.push_back(l.value.to_vector<float>());
  nn::AdamW optimizer(method.param_groups());
  optimizer.step(backward(recipe.objective.loss(method.quantized(fp)->forward(x, at), target)));
  size_t i = 0;
  for (const Learnable& l : method.learnables()) {
    CAPTURE(l.name);
    const bool moved = l.value.to_vector<float>() != then[i++];
    // Zero points learn from clamped weights alone, and a range that holds all has none.
    if (!l.name.ends_with("zero_point")) CHECK(moved);
  }
  Rng again(3);
  LlamaBlock same = random_block(again);
  CHECK(bit_equal(fp.mlp.up_proj.dense(), same.mlp.up_proj.dense()));
  CHECK(bit_equal(fp.input_layernorm.weight, same.input_layernorm.weight));

  // Trained and committed differ by the rounding of the scales alone.
  NoGrad off;
  const auto trained = method.quantized(fp);
  const auto committed = method.commit(fp);
  CHECK(close(committed.simulated->forward(x, at), trained->forward(x, at), 1e-2));
  CHECK(bit_equal(dynamic_cast<const LlamaBlock&>(*committed.packed).input_layernorm.weight,
                  dynamic_cast<const LlamaBlock&>(*trained).input_layernorm.weight));
}

TEST_CASE("plans: the epoch with the smallest loss is kept") {
  Recipe r = quick_recipe("efficientqat", 2, 4);
  const auto calls = std::make_shared<int>(0);
  r.objective.loss = [calls](const Tensor& y, const Targets& t) {
    const int epoch = (*calls)++ / 4 % 4;  // 8 windows by twos, 4 epochs a block
    return mse(y, t.of_fp) * (epoch >= 2 ? 100.0 : 1.0);
  };
  const Run kept(r);
  for (const BlockReport& b : kept.reports) {
    CHECK(b.epoch_loss.size() == 4);
    CHECK((b.kept_epoch == 1 || b.kept_epoch == 2));
  }
  r.train.keep_best = false;
  *calls = 0;
  const Run last(r);
  CHECK(last.reports[0].kept_epoch == 0);
  CHECK(last.reports[0].epoch_loss == kept.reports[0].epoch_loss);
  CHECK(kept.bytes(0) != last.bytes(0));
}

TEST_CASE("plans: a rate that is missing is named") {
  Rng rng(6);
  LlamaBlock fp = random_block(rng);
  Recipe r = quick_recipe("efficientqat");
  r.train.lr.erase("grid");
  const BlockMethod method(r, fp);
  CHECK_THROWS_WITH_AS(method.param_groups(),
                       doctest::Contains("recipe efficientqat: no learning rate for \"grid\""),
                       Error);
}

}  // namespace
}  // namespace omq::quant
