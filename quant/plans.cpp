// How each kind of learning beyond clip factors goes, with the numbers of the paper that it comes
// from; OmniQuant's own are in methods/omniquant.cpp.
#include "quant/compose.h"

namespace omq::quant {

Objective block_objective(const Options& o, bool augmented, TokenWeight usual) {
  const TokenWeight w = o.token_loss < 0    ? usual
                        : o.token_loss == 0 ? TokenWeight::Equal
                                            : TokenWeight::InverseSize;
  return augmented ? augmented_mse(o.aug_weight, w) : block_mse(w);
}

// EfficientQAT's block phase (arXiv 2407.11062, spec weight-methods §1). There 4096 sequences are
// seen twice, at rates of 2e-5 (2 bits) and 1e-5 for weights and 1e-4 for grids, two a step; here
// few windows have to be seen often, one a step, and the steps are larger by as much as there are
// fewer of them: at the paper's rates weights do not come as far as the next code. The official
// code lets the gains of norms learn at the rate of the weights; so does this.
Plan weights_plan(const Options& o) {
  Plan p = clip_plan(o);  // rates of clips and transforms that learn along
  TrainPlan& t = p.train;
  const bool coarse = o.spec.wbits == 2;
  const double rate = coarse ? 2e-4 : 1e-4;
  t.epochs = o.epochs >= 0 ? o.epochs : 20;
  t.batch_size = o.batch_size > 0 ? o.batch_size : 1;
  t.lr["grid"] = coarse ? 1e-3 : 5e-4;
  t.lr["weights"] = t.lr["norms"] = rate;
  t.weights = t.norms = true;
  t.rate_shape = RateShape::Cosine;
  t.last_rate = 1.0 / 20;
  t.keep_best = true;
  p.objective = block_objective(o, o.aug_loss > 0, TokenWeight::Equal);
  return p;
}

// Norm Tweaking (arXiv 2309.02784, spec weight-methods §6). What learns is a factor of each gain,
// so that the rate is a relative one. Deeper blocks learn faster. The paper's one pass at 1e-5 is
// for 128 windows of 2048 tokens and large models; on few windows it moved nothing: 1014 → 1002 at
// W2 g64 on SmolLM2, with this rate and four passes 493 (docs/methods.md).
Plan norms_plan(const Options& o) {
  return {{.epochs = o.epochs >= 0 ? o.epochs : 4,
           .batch_size = o.batch_size > 0 ? o.batch_size : 1,
           .lr = {{"norms", 1e-3}},
           .weight_decay = o.weight_decay,
           .compute = o.compute,
           .clips = false,
           .norms = true,
           .after_rounding = true,
           .depth_slope = 1},
          channel_statistics()};
}

// SignRound (arXiv 2309.05516, spec weight-methods §10): rates of 1 for a whole run fall to 0 along
// a line, so that an offset can move by half a step in all.
Plan rounding_plan(const Options& o) {
  Plan p = clip_plan(o);  // rates of clips and transforms that learn along
  TrainPlan& t = p.train;
  t.epochs = o.epochs >= 0 ? o.epochs : 50;
  t.batch_size = o.batch_size > 0 ? o.batch_size : 4;
  t.rounding = true;
  t.sign_descent = true;
  t.lr["rounding"] = t.lr["range"] = 1;  // 1 / steps
  t.lr["lwc"] = o.lwc_lr.value_or(1);
  t.lr["kronecker"] = t.lr["lac"] = 0.1;
  t.lr["let"] = o.let_lr >= 0 ? o.let_lr : 0.1;
  t.lr["grid"] = 0.01;
  t.rate_shape = RateShape::Linear;
  t.keep_best = true;
  p.objective = block_objective(o, o.aug_loss > 0, TokenWeight::Equal);
  return p;
}

// FlatQuant (arXiv 2410.09426, spec transform-methods §2). There 128 windows are seen 15 times,
// four a step, and blocks learn on the full-precision stream; on the quantised one, where errors of
// the blocks before are taken back, one trial on one model went better (quant/README.md).
Plan kronecker_plan(const Options& o) {
  Plan p = clip_plan(o);
  TrainPlan& t = p.train;
  t.epochs = o.epochs >= 0 ? o.epochs : 15;
  t.batch_size = o.batch_size > 0 ? o.batch_size : 4;
  t.lr["kronecker"] = 5e-3;
  t.lr["lwc"] = t.lr["lac"] = o.lwc_lr.value_or(5e-2);
  t.rate_shape = RateShape::Cosine;
  t.last_rate = 1e-3;
  t.act_clips = o.spec.activations().linear < 16;
  t.unit_loss = true;
  p.objective = block_objective(o, o.aug_loss > 0, TokenWeight::Equal);
  return p;
}

}  // namespace omq::quant
