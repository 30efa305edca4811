// AdamW over the adamw kernel. The update is one of the three in-place writers of the library.
#include "nn/adamw.h"

#include <cmath>

#include "tensor/kernels.h"

namespace omq::nn {

AdamW::AdamW(std::vector<ParamGroup> groups, AdamWOptions options)
    : groups_(std::move(groups)), options_(options) {
  for (const ParamGroup& group : groups_) {
    auto& row = moments_.emplace_back();
    for (const Tensor& p : group.params) {
      check(p.storage() && p.storage()->writable() && p.is_contiguous(),
            "adamw: a parameter of shape {} in group '{}' cannot be written in place (mapped from "
            "a file, or a view); "
            "copy it first",
            p.shape(), group.name);
      row.push_back({Tensor::zeros(p.shape(), p.dtype(), p.device()),
                     Tensor::zeros(p.shape(), p.dtype(), p.device())});
    }
  }
}

void AdamW::step(const Gradients& g) {
  ++steps_;
  const auto t = static_cast<double>(steps_);
  for (size_t i = 0; i < groups_.size(); ++i) {
    const ParamGroup& group = groups_[i];
    const AdamWStep step{group.lr * lr_factor_,
                         options_.beta1,
                         options_.beta2,
                         options_.eps,
                         group.weight_decay,
                         1.0 - std::pow(options_.beta1, t),
                         1.0 - std::pow(options_.beta2, t)};
    for (size_t j = 0; j < group.params.size(); ++j) {
      Tensor p = group.params[j];
      if (!g.contains(p)) continue;
      on(p).adamw(p, moments_[i][j].m, moments_[i][j].v, g[p], step);
    }
  }
}

}  // namespace omq::nn
