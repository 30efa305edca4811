// PrefetchedSource: the block after the one that was asked for is read while that one is worked on.
//
// For devices that leave the host idle meanwhile. Costs the host's memory of one block more; an
// error of reading ahead is thrown by the call that asks for the block.
#pragma once

#include <future>
#include <memory>

#include "nn/block.h"

namespace omq::quant {

class PrefetchedSource final : public nn::BlockSource {
 public:
  // `plain` must outlive this and is used by nobody else meanwhile.
  explicit PrefetchedSource(nn::BlockSource& plain) : plain_(plain) {}
  ~PrefetchedSource() override { wait(); }
  int size() const override { return plain_.size(); }
  std::unique_ptr<nn::Block> load(int i) override;
  std::string name(int i) const override { return plain_.name(i); }
  Tensor embed(const Tensor& ids) override;
  nn::RopeTables rope(int64_t positions) override;

 private:
  void wait();  // until nobody reads from plain_

  nn::BlockSource& plain_;
  int next_ = -1;  // the block that ahead_ brings
  std::future<std::unique_ptr<nn::Block>> ahead_;
};

}  // namespace omq::quant
