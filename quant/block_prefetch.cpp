// One task at a time reads ahead.
#include "quant/block_prefetch.h"

#include <utility>

#include "autograd/ops.h"

namespace omq::quant {
namespace {

// Weights are mapped from the file: touches every page, so that the disk is not waited for later.
void bring_in(nn::Block& block) {
  constexpr size_t kPage = 4096;
  block.visit([](std::string_view, Tensor& t) {
    if (t.device().type != DeviceType::CPU) return;
    const auto* bytes = static_cast<const volatile uint8_t*>(t.raw());
    for (size_t i = 0; i < t.nbytes(); i += kPage) static_cast<void>(bytes[i]);
  });
}

}  // namespace

std::unique_ptr<nn::Block> PrefetchedSource::load(int i) {
  std::unique_ptr<nn::Block> block;
  if (ahead_.valid() && next_ == i) {
    block = ahead_.get();
  } else {
    wait();
    block = plain_.load(i);
  }
  if (i + 1 < plain_.size()) {
    next_ = i + 1;
    ahead_ = std::async(std::launch::async, [this, i] {
      const NoGrad off;
      auto next = plain_.load(i + 1);
      bring_in(*next);
      return next;
    });
  }
  return block;
}

Tensor PrefetchedSource::embed(const Tensor& ids) {
  wait();
  return plain_.embed(ids);
}

nn::RopeTables PrefetchedSource::rope(int64_t positions) {
  wait();
  return plain_.rope(positions);
}

void PrefetchedSource::wait() {
  if (ahead_.valid()) ahead_.wait();
}

}  // namespace omq::quant
