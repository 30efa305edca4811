// Getting out of a loss that is not a finite number: back to the start of the epoch, at half the
// learning rates, with fresh moments; and a message that names the tensor in which it began.
//
// A step whose loss or learnables are not finite costs one epoch, never the run, and never reaches
// a file: after kTries returns in one block calibration ends with an error.
#pragma once

#include <string>
#include <vector>

#include "nn/block.h"
#include "quant/objective.h"
#include "quant/report.h"

namespace omq::quant {

inline constexpr int kTries = 3;

// On any device, in one pass.
bool all_finite(const Tensor& x);

// The values of learnables at one moment.
class Snapshot {
 public:
  explicit Snapshot(const std::vector<Learnable>& learnables);
  void restore() const;  // in place: whoever holds the parameters sees it

 private:
  std::vector<Tensor> now_, then_;
};

// Values into learnables, in place, between any devices. False when names or shapes are not the
// same.
bool assign(const std::vector<Learnable>& learnables, const std::vector<Learnable>& values);

struct Culprit {
  std::string tensor;     // "learnable mlp.up_proj.lwc.gamma_logit", "output of mlp.down_proj"
  bool hopeless = false;  // it does not depend on what is learned: no rate helps
};

// The first tensor that is not finite on the way from weights and inputs to the loss. fp: the
// block in full precision; quantized: with the learnables that failed, on the samples x [B,T,D].
Culprit first_not_finite(nn::Block& fp, const nn::Block& quantized,
                         const std::vector<Learnable>& learnables, const Tensor& x,
                         const Targets& targets, const nn::Positions& at);

}  // namespace omq::quant
