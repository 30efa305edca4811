// Hooks: what a program hangs into the block loop. Every member may be left out.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "nn/block.h"
#include "quant/report.h"

namespace omq::quant {

// Finished blocks of a run that was cut short, and where new ones go.
//
// Learnables and nothing larger: from them a restored block is made again by the very call that
// committed it, and the two streams by running it once each. That is two forward passes where
// learning took one forward and one backward for every epoch, and it saves writing both streams
// [N,T,D] after every block, which for a large model is gigabytes each time.
struct BlockStore {
  virtual ~BlockStore() = default;
  // Nothing when block i is not there, or cannot be used; then no later one is asked for.
  virtual std::optional<FinishedBlock> load(int i) = 0;
  virtual void save(int i, const FinishedBlock& block, nn::Block& packed) = 0;
  // Whether `packed`, made from what load(i) gave, is what was saved.
  virtual bool confirms(int i, nn::Block& packed) = 0;
};

struct Hooks {
  std::function<void()> poll;                      // between steps; throws to end the run
  std::function<void(const std::string&)> notice;  // one line that a person should see
  BlockStore* store = nullptr;
};

}  // namespace omq::quant
