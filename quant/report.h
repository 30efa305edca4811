// BlockReport: what calibration tells about a block, and FinishedBlock: all that is needed to make
// that block again without learning it again.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "tensor/tensor.h"

namespace omq::quant {

// A tensor that is learned, under a name for people: "self_attn.q_proj.lwc.gamma_logit".
struct Learnable {
  std::string name;
  Tensor value;
};

// One return to the start of an epoch, because a number was none (quant/recovery.h).
struct Recovery {
  int epoch = 0;           // counts from 1
  double rate_factor = 1;  // of every learning rate from then on
  std::string tensor;      // the first that was not finite
};

struct BlockReport {
  int index = 0;
  std::string name;
  std::vector<double> epoch_loss;  // mean objective of each epoch
  std::vector<Recovery> recoveries;
  double committed_loss = 0;  // mean squared error of the committed block on the quantised stream
  double target_mean_square = 0;  // of the full-precision output, to read the loss against
  double packed_error = 0;  // worst linear's ‖packed(x) − dense(x)‖ / ‖dense(x)‖, first sample
  double seconds = 0;
  size_t peak_bytes = 0;  // tensors alive at most during this block
  bool restored = false;  // from an earlier run; not learned in this one
};

struct FinishedBlock {
  BlockReport report;
  std::vector<Learnable> learnables;
};

}  // namespace omq::quant
