// Activation statistics: what the inputs of the linears at a block's sites look like, channel by
// channel, over all calibration tokens (spec omniquant §6). The transforms start from them. They
// are collected in the pass that computes F(W, X).
#pragma once

#include <memory>
#include <vector>

#include "nn/block.h"

namespace omq::quant {

// F32 [in], of the tensor that goes into the site's consumers.
struct ChannelStats {
  Tensor abs_max;  // largest |x|
  Tensor middle;   // (max + min)/2 of a window; the first one's, then 1 % of every further one's
};
// In the order of Block::sites(); undefined tensors where a site has no consumer of activations
// (QueryKey), or when no text was run.
using BlockStats = std::vector<ChannelStats>;

class StatsCollector {
 public:
  // Looks at what goes through `block` from now on, a window a forward. The collector must outlive
  // the calls.
  explicit StatsCollector(nn::Block& block);
  BlockStats take() { return std::move(*stats_); }

 private:
  std::shared_ptr<BlockStats> stats_;
};

}  // namespace omq::quant
