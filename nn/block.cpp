// Blocks between devices.
#include "nn/block.h"

#include "autograd/ops.h"

namespace omq::nn {

void move_to(Block& block, Device device) {
  block.visit([&](std::string_view, Tensor& t) {
    if (t.defined() && t.device() != device) t = to(t, device);
  });
}

}  // namespace omq::nn
