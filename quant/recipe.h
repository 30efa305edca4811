// Recipe: a quantisation method as data. One file per method under methods/; methods.def lists
// them.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/compute.h"
#include "quant/clip.h"
#include "quant/objective.h"
#include "quant/rotation.h"
#include "quant/rounder.h"
#include "quant/spec.h"
#include "quant/transform_let.h"

namespace omq::quant {

// What a user may set; unset numbers take the method's default.
struct Options {
  QuantSpec spec;
  int epochs = -1;  // -1: the method's (paper: 20, 40 at 2 bits)
  int batch_size = 1;
  double lwc_lr = 1e-2, weight_decay = 0;
  int aug_loss = -1;  // -1: the method's; 0 or 1
  int let = -1;       // the equivalent transformation; -1: when activations are quantised
  double let_lr = -1, alpha = -1;  // below 0: the method's for these bits
  int let_shift = -1;              // its shifts; -1: the method's for these bits
  bool let_up_to_down = false;     // its optional site
  // The official choices where ours differ (spec omniquant §17); QuantSpec holds those of grids.
  bool untied_pairs = false, one_consumer = false, signed_max = false;
  uint64_t rotation_seed = 0;
  Compute compute = Compute::F32;
};

struct TrainPlan {
  int epochs = 0;  // 0: nothing is learned
  int batch_size = 1;
  std::map<std::string, double> lr;  // by ParamGroup name
  double weight_decay = 0;
  Compute compute = Compute::F32;  // of the products of a training step; streams and targets: F32
};

struct Recipe {
  std::string name;
  QuantSpec spec;
  // Of the network, before anything else sees it: quantize() wants a RotatedSource then.
  std::optional<RotationOptions> rotation = {};
  // Built per block and per linear from the full-precision tensors (and statistics).
  std::vector<std::function<std::unique_ptr<Transform>(nn::Block& fp, const BlockStats& stats)>>
      transforms;
  std::function<std::unique_ptr<Clip>(const Tensor& w, GroupSpec spec)> clip;
  std::shared_ptr<const Rounder> rounder;
  Objective objective;
  bool augmented = false;         // which objective, for reports
  std::optional<LetOptions> let;  // the transformation's settings, for reports
  TrainPlan train;
};

struct MethodInfo {
  std::string_view name, summary;
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
