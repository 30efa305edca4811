// BlockReport: what calibration tells about a block, and FinishedBlock: all that is needed to make
// that block again without learning it again.
#pragma once

#include <cstddef>
#include <cstdint>
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

// How many of some values fall into each bin [k·width, (k+1)·width) of a fixed grid, from the first
// bin that holds one to the last: histograms of one width lie on each other bin by bin.
struct Histogram {
  double width = 1;
  int64_t first = 0;            // k of counts[0]
  std::vector<int64_t> counts;  // empty: there were no values
  double mean = 0;              // of the values themselves
  bool operator==(const Histogram&) const = default;
};

// One matrix of a block (quant/linear_report.h).
struct LinearReport {
  std::string name;          // "self_attn.q_proj"
  double error_nearest = 0;  // of the full-precision matrix rounded to nearest
  double error = 0;          // of the committed matrix
  Histogram gamma, beta;     // clip factors of all rows and groups; empty where none are learned
  bool operator==(const LinearReport&) const = default;
};

// What a transformation learned at one place of the block.
struct SiteReport {
  std::string name;             // "qkv"
  Histogram log2_scale, shift;  // over its channels; empty where not learned
  bool operator==(const SiteReport&) const = default;
};

struct BlockReport {
  int index = 0;
  std::string name;
  std::vector<double> epoch_loss;  // mean objective of each epoch: see Objective
  int kept_epoch = 0;              // whose end was kept, for plans that keep the best; else 0
  std::vector<Recovery> recoveries;
  double committed_loss = 0;  // mean squared error of the committed block on the quantised stream
  double target_mean_square = 0;  // of the full-precision output, to read that against
  double packed_error = 0;  // worst linear's ‖packed(x) − dense(x)‖ / ‖dense(x)‖, first sample
  double seconds = 0;
  size_t peak_bytes = 0;       // tensors alive at most during this block
  bool restored = false;       // from an earlier run; not learned in this one
  bool output_errors = false;  // errors of linears: of their outputs; false: of their weights
  std::vector<LinearReport> linears;
  std::vector<SiteReport> sites;
};

struct FinishedBlock {
  BlockReport report;
  std::vector<Learnable> learnables;
};

}  // namespace omq::quant
