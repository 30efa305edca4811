// What a calibration will need in memory, before it begins: an estimate from shapes, and where the
// samples go.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "quant/recipe.h"

namespace omq::quant {

struct PlanShapes {
  std::vector<std::array<int64_t, 2>> linears;  // [out, in] of a block's matrices
  int64_t hidden = 0;
  int64_t windows = 0, tokens = 0;  // of calibration text; 0: none
};

// Bytes. `block`: weights, learnables with their moments, and one step's activations and gradients.
// `samples`: the streams of all windows, of which a learned block holds three, and a fourth with
// the augmented loss.
struct MemoryPlan {
  size_t block = 0, samples = 0;
  bool samples_on_host = false;  // the device holds the block alone
  size_t on_device() const { return block + (samples_on_host ? 0 : samples); }
};

// The estimate for `device`, made to lie above what is used rather than below. Samples stay in host
// memory where the device has no room for both. limit: bytes, 0: none. Throws Error, naming both
// sizes, when even the block does not fit.
MemoryPlan plan_memory(const Recipe& recipe, const PlanShapes& shapes, Device device, size_t limit);

}  // namespace omq::quant
