// Recipe: a quantisation method as data. One file per method under methods/; methods.def lists
// them. A method is a name for a Line (compose.h makes the recipe of one).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/compute.h"
#include "nn/adamw.h"
#include "quant/clip.h"
#include "quant/objective.h"
#include "quant/rotation.h"
#include "quant/rounder.h"
#include "quant/spec.h"
#include "quant/transform_kronecker.h"
#include "quant/transform_let.h"

namespace omq::quant {

// The pieces of a recipe by their names, as on the command line.
//   transform   none | let (learnable equivalent transformation) | kronecker (learned affine
//               transforms, partly online)
//   clip        minmax | mse (searched) | lwc (σ-factors) | scaled (shares of the range) |
//               free (scale, zero point)
//   round       nearest | gptq (solved on the inputs) | learned (an offset a weight)
//   train       none | clip (what clip, transform and rounding learn) | weights (these, weights and
//               norms) | norms (after rounding)
struct Line {
  std::string transform, clip, round, train;
  // "--transform none --clip lwc --round nearest --train clip"
  std::string to_string() const;
  bool operator==(const Line&) const = default;
};

// What a user may set; unset numbers take the method's default.
struct Options {
  QuantSpec spec;
  Line line = {};                            // pieces that are not the method's; empty: they are
  std::map<std::string, double> rates = {};  // by ParamGroup name, over the plan's
  double damping = -1;                       // of gptq; below 0: its default
  bool act_order = true;                     // of gptq
  int epochs = -1;                           // -1: the method's (paper: 20, 40 at 2 bits)
  int batch_size = 0;                        // 0: the method's
  std::optional<double> lwc_lr = {};         // none: the method's
  double weight_decay = 0;
  int aug_loss = -1;         // -1: the method's; 0 or 1
  double aug_weight = 1;     // of the augmented loss (official: 1)
  int token_loss = -1;       // TokenWeight::InverseSize (1) or Equal (0); -1: the method's
  bool clip_search = false;  // clipping starts where a search finds it best, not at σ(4)
  int let = -1;              // the equivalent transformation; -1: when activations are quantised
  double let_lr = -1, alpha = -1;  // below 0: the method's for these bits
  int let_shift = -1;              // its shifts; -1: the method's for these bits
  bool let_up_to_down = false;     // its optional site
  // The official choices where ours differ (spec omniquant §17); QuantSpec holds those of grids.
  bool untied_pairs = false, one_consumer = false, signed_max = false;
  uint64_t rotation_seed = 0;
  int rotate_norms = -1;  // behind each norm (1) or the residual stream (0); -1: the method's
  double act_clip = -1, qkv_clip = -1;       // QuantSpec's; below 0: the method's, mostly 1
  int learn_act_clip = -1;                   // TrainPlan's; -1: the method's
  int full_inputs = -1;                      // TrainPlan's; -1: the plan's
  std::optional<RateShape> rate_shape = {};  // TrainPlan's; unset: the plan's
  std::optional<bool> keep_best = {};        // likewise
  Compute compute = Compute::F32;
};

struct TrainPlan {
  int epochs = 0;  // 0: nothing is learned
  int batch_size = 1;
  std::map<std::string, double> lr = {};  // by ParamGroup name
  double weight_decay = 0;
  Compute compute = Compute::F32;  // of the products of a training step; streams and targets: F32
  // What learns. clips: what clips and transforms hold; weights: the matrices; norms: a factor for
  // each gain of the norms before linears; rounding: what is added to w/h before it is rounded.
  bool clips = true, weights = false, norms = false, rounding = false;
  bool act_clips = false;  // shares of the ranges of matrices' inputs, from QuantSpec::act_clip
  bool after_rounding = false;  // norms alone, codes being fixed first
  RateShape rate_shape = RateShape::Constant;
  double last_rate = 0;       // share of the rates in the last step
  bool sign_descent = false;  // SignSGD instead of AdamW; rates are for a whole run, divided by
                              // its steps
  bool keep_best = false;     // the end of the epoch with the smallest loss, not the last
  double depth_slope = 0;     // rates of block i of L: times 1 + slope·i/L
  // A block learns from the full-precision stream; else from the quantised one, whose errors it
  // then learns to take back.
  bool full_inputs = false;
  bool unit_loss = false;  // each step's loss is divided by its own value before it is
                           // differentiated: all steps, and all blocks, weigh alike
};

struct Recipe {
  std::string name;   // "omniquant"
  Line line;          // what it is made of
  std::string title;  // its name, and where the line is another than the method's the difference:
                      // "omniquant --round gptq"
  QuantSpec spec;
  // Of the network, before anything else sees it: quantize() wants a RotatedSource then.
  std::optional<RotationOptions> rotation = {};
  // Built per block and per linear from the full-precision tensors (and statistics).
  std::vector<std::function<std::unique_ptr<Transform>(nn::Block& fp, const BlockStats& stats)>>
      transforms;
  std::function<std::unique_ptr<Clip>(const Tensor& w, GroupSpec spec)> clip;
  std::shared_ptr<const Rounder> rounder;
  Objective objective;
  bool augmented = false;    // which objective, for reports
  double aug_weight = 1;     // of its second term, for reports
  bool clip_search = false;  // how clipping starts, for reports
  // The transformation's settings, for reports; at most one of them.
  std::optional<LetOptions> let;
  std::optional<KroneckerOptions> kronecker;
  TrainPlan train;

  // Whether anything in it looks at calibration text.
  bool needs_text() const {
    return train.epochs > 0 || clip_search || !transforms.empty() ||
           (rounder && rounder->wants_hessian());
  }
};

struct MethodInfo {
  std::string name;  // "norm-tweaking"
  std::string_view summary;
  Recipe (*make)(const Options&);
};
// Every row of methods.def.
const std::vector<MethodInfo>& methods();
// Throws Error naming the methods that there are.
Recipe make_recipe(std::string_view method, const Options& options);

#define OMQ_METHOD(name, summary) Recipe name(const Options& options);
#include "quant/methods.def"
#undef OMQ_METHOD

}  // namespace omq::quant
