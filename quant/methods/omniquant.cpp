// OmniQuant (arXiv 2308.13137v3): learnable weight clipping (Eq. 2) and the learnable equivalent
// transformation (Eq. 3, 5), trained together against the block objective (Eq. 1).
#include "quant/compose.h"

namespace omq::quant {
namespace {

// The official scripts' settings by bits (spec omniquant §12), but at 4-bit activations: there the
// rate that those scripts use for Llama 2, no shifts and no augmented loss gave lower perplexities
// on one model. So did tokens that count by their size (TokenWeight), at most settings
// (docs/performance.md).
struct Preset {
  int epochs = 20;
  double let_lr = 5e-3, alpha = 0.5;
  bool augmented = false, shift = true;
};
Preset preset_of(const QuantSpec& s) {
  if (s.wbits == 2) return {.epochs = 40, .augmented = true};
  if (s.wbits <= 4 && s.abits <= 4) return {.let_lr = 1e-3, .shift = false};
  return {};
}

}  // namespace

Plan clip_plan(const Options& o) {
  const Preset preset = preset_of(o.spec);
  const bool augmented = o.aug_loss < 0 ? preset.augmented : o.aug_loss != 0;
  return {{.epochs = o.epochs >= 0 ? o.epochs : preset.epochs,
           .batch_size = o.batch_size > 0 ? o.batch_size : 1,
           .lr = {{"lwc", o.lwc_lr.value_or(1e-2)},
                  {"let", o.let_lr >= 0 ? o.let_lr : preset.let_lr},
                  {"kronecker", 5e-3},
                  {"lac", o.lwc_lr.value_or(1e-2)},
                  {"grid", 1e-4},
                  {"range", 5e-3}},
           .weight_decay = o.weight_decay,
           .compute = o.compute},
          block_objective(o, augmented, TokenWeight::InverseSize)};
}

LetOptions let_options(const Options& o) {
  const Preset preset = preset_of(o.spec);
  const bool shift = o.spec.activations().any() && preset.shift;
  return {.alpha = o.alpha >= 0 ? o.alpha : preset.alpha,
          .shift = o.let_shift < 0 ? shift : o.let_shift != 0,
          .tied_pairs = !o.untied_pairs,
          .up_to_down = o.let_up_to_down,
          .all_consumers = !o.one_consumer,
          .signed_max = o.signed_max};
}

Recipe omniquant(const Options& o) {
  const char* const transform = o.spec.activations().any() ? "let" : "none";
  return compose("omniquant", {transform, "lwc", "nearest", "clip"}, o);
}

}  // namespace omq::quant
