// Learning one block's clipping and transformation: steps ②–④ of the paper's algorithm, and the way
// back when a number is none (recovery.h).
#pragma once

#include <chrono>

#include "quant/calibrate.h"
#include "tensor/step_graph.h"

namespace omq::quant {

// One update of the learnables from one batch: quantise, forward, loss, gradients, AdamW.
//
// Its tensors keep their addresses from batch to batch, so on a GPU all of it is one recording that
// is replayed (tensor/step_graph.h). Nothing is read back: losses stay on the device.
class LearningStep {
 public:
  // fp, the method and the optimiser must outlive it. x and targets say shapes and device.
  LearningStep(const Recipe& recipe, const BlockMethod& method, const nn::Block& fp,
               nn::AdamW& optimizer, const nn::Positions& at, const Tensor& x,
               const Targets& targets);

  // x [B,T,D] and its targets, on the block's device or in host memory. The loss before the update,
  // [1]; it is overwritten by the next call.
  const Tensor& operator()(const Tensor& x, const Targets& targets);

 private:
  void learn();

  const Recipe& recipe_;
  const BlockMethod& method_;
  const nn::Block& fp_;
  nn::AdamW& optimizer_;
  const nn::Positions& at_;
  Tensor x_, loss_;  // of this batch
  Targets targets_;
  StepGraph graph_;
};

// What a block is learned from: streams [N,T,D], on the block's device or in host memory.
struct LearningData {
  const Tensor& x;  // of the quantised stream
  const Targets& targets;
  const nn::Positions& at;
  int blocks = 1;  // of the model
};

// Runs the recipe's epochs; losses, recoveries and time go into `report`, whose index says which
// block this is. Throws Error when a loss stays not finite at lower rates.
void learn(const Recipe& recipe, const BlockMethod& method, nn::Block& fp, const LearningData& data,
           const Hooks& hooks, const Progress& progress, BlockReport& report,
           std::chrono::steady_clock::time_point start);

}  // namespace omq::quant
