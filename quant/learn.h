// Learning one block's clipping and transformation: steps ②–④ of the paper's algorithm, and the way
// back when a number is none (recovery.h).
#pragma once

#include <chrono>

#include "quant/calibrate.h"
#include "tensor/step_graph.h"

namespace omq::quant {

// Some samples of the quantised stream, [B,T,D], and what the block should make of them.
struct Batch {
  Tensor x;
  Targets targets;
};

// One update of the learnables from one batch: quantise, forward, loss, gradients, AdamW.
//
// Its tensors keep their addresses from batch to batch, so on a GPU all of it is one recording that
// is replayed (tensor/step_graph.h). Nothing is read back: losses stay on the device.
class LearningStep {
 public:
  // fp, the method and the optimiser must outlive it. `like` says shapes and where batches are.
  // loss_scale: what the loss is multiplied by on its way back, and gradients divided by after it.
  LearningStep(const Recipe& recipe, const BlockMethod& method, const nn::Block& fp,
               nn::AdamW& optimizer, const nn::Positions& at, const Batch& like,
               double loss_scale = 1);

  // x [B,T,D] and its targets, on the block's device or in host memory. The loss before the update,
  // [1]; it is overwritten by the next call. next: the batch of the next call, where it is known;
  // from pinned host memory it comes to the device while this one is learned from.
  const Tensor& operator()(const Batch& batch, const Batch* next = nullptr);
  ~LearningStep();

 private:
  void learn();
  void place(const Batch& batch);

  const Recipe& recipe_;
  const BlockMethod& method_;
  const nn::Block& fp_;
  nn::AdamW& optimizer_;
  const nn::Positions& at_;
  Batch batch_, ahead_;         // where the step reads; where the next batch arrives, if it does
  const void* next_ = nullptr;  // which one that is: the address of its x
  Tensor loss_;
  double loss_scale_;
  StepGraph graph_;
};

// A power of two by which a mean over `elements` is multiplied before it is differentiated in
// `compute`. Gradients of a mean squared error are differences · 2/elements, 10⁻⁹ for a window of a
// large model: in F16 they would be zeros. 1 where exponents have eight bits.
double loss_scale(Compute compute, int64_t elements);

// What a block is learned from: streams [N,T,D], on the block's device or in host memory.
struct LearningData {
  const Tensor& x;  // of the quantised stream, or the other one (TrainPlan::full_inputs)
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
