// Calibration: the paper's algorithm, block by block, over any BlockSource (Eq. 1).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "nn/block.h"
#include "quant/recipe.h"

namespace omq::quant {

// The recipe's pieces made for one block.
class BlockMethod {
 public:
  BlockMethod(const Recipe& recipe, nn::Block& fp);

  // A copy of fp whose matrices went through transform, clip and fake quantisation; differentiable
  // in the learnables.
  std::unique_ptr<nn::Block> quantized(const nn::Block& fp) const;
  std::vector<nn::ParamGroup> param_groups() const;

  struct Committed {
    std::unique_ptr<nn::Block> simulated;  // dense, dequantised: what the packed block computes
    std::unique_ptr<nn::Block> packed;     // codes
  };
  // Fixes the learnables: scales are rounded to f16 first, then codes are chosen on that grid, so
  // that the packed block equals the simulated one bit for bit.
  Committed commit(const nn::Block& fp) const;

 private:
  const Recipe& recipe_;
  std::vector<std::unique_ptr<Transform>> transforms_;
  std::vector<std::unique_ptr<Clip>> clips_;  // in the order of Block::linears()
};

// One matrix by round-to-nearest: codes, then packed. For tables outside the blocks.
std::shared_ptr<nn::PackedWeight> pack_nearest(const Tensor& w, const QuantSpec& spec);

struct BlockReport {
  int index = 0;
  std::string name;
  std::vector<double> epoch_loss;  // mean objective of each epoch
  double committed_loss = 0;  // mean squared error of the committed block on the quantised stream
  double target_mean_square = 0;  // of the full-precision output, to read the loss against
  double packed_error = 0;  // ‖packed − simulated‖ / ‖simulated − input‖ on the first sample
  double seconds = 0;
  size_t peak_bytes = 0;  // tensors alive at most during this block
};

// Called after every epoch (epoch counts from 1) and, with epoch = -1, when the block is done.
using Progress = std::function<void(const BlockReport& block, int epoch, int epochs)>;

struct CalibrationData {
  Tensor ids;  // I32 [samples, tokens]; undefined: no streams, for recipes that learn nothing
};

// Quantises every block of the source into the sink, keeping the two streams of §8 (full precision
// and quantised). `simulated` (optional) receives the dense twins. Throws Error naming the block
// when a loss is not finite.
std::vector<BlockReport> quantize(nn::BlockSource& source, nn::BlockSink& sink,
                                  const Recipe& recipe, const CalibrationData& data,
                                  const Progress& progress = {},
                                  nn::BlockSink* simulated = nullptr);

}  // namespace omq::quant
