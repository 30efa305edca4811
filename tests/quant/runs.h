// Whole runs over two random blocks, for the tests of plans and methods.
#pragma once

#include <cmath>
#include <vector>

#include "quant/calibrate.h"
#include "tests/quant/blocks.h"

namespace omq::quant {

struct Run {
  PlainSource source;
  KeptBlocks packed, simulated;
  std::vector<BlockReport> reports;
  explicit Run(const Recipe& recipe, Device device = {}, const Hooks& hooks = {}) {
    reports =
        quantize(source, packed, recipe, {random_windows(8, 12), device}, {}, &simulated, hooks);
  }
  std::vector<uint8_t> bytes(size_t block) const {
    std::vector<uint8_t> all;
    packed.blocks[block]->visit([&](std::string_view, Tensor& t) {
      const auto* p = static_cast<const uint8_t*>(t.raw());
      all.insert(all.end(), p, p + t.nbytes());
    });
    return all;
  }
  const LlamaBlock& packed_block(size_t i) const {
    return dynamic_cast<const LlamaBlock&>(*packed.blocks[i]);
  }
  const LlamaBlock& simulated_block(size_t i) const {
    return dynamic_cast<const LlamaBlock&>(*simulated.blocks[i]);
  }
};

// On these small blocks with few windows higher rates show in few epochs what the plans are for.
inline Recipe quick_recipe(const char* method, int bits = 2, int epochs = 12) {
  Options o;
  o.spec = {.wbits = bits, .group_size = 32};
  o.epochs = epochs;
  o.batch_size = 2;
  o.rates = {{"weights", 1e-3}, {"grid", 1e-3}, {"norms", 2e-3}};
  return make_recipe(method, o);
}

}  // namespace omq::quant
