// AdamW over the adamw kernel. The update is one of the three in-place writers of the library.
#include "nn/adamw.h"

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
      if (clock_.defined()) continue;
      const bool on_cpu = p.device().type == DeviceType::CPU;
      clock_ = Tensor::zeros({4}, on_cpu ? DType::F64 : DType::F32, p.device());
    }
  }
}

int64_t AdamW::steps() const {
  if (!clock_.defined()) return 0;
  return static_cast<int64_t>(clock_.dtype() == DType::F64 ? clock_.to_vector<double>()[0]
                                                           : double{clock_.to_vector<float>()[0]});
}

void AdamW::step(const Gradients& g, const Tensor& loss) {
  if (!clock_.defined()) return;
  on(clock_).adamw_tick(clock_, loss,
                        {.lr = 0,
                         .beta1 = options_.beta1,
                         .beta2 = options_.beta2,
                         .eps = options_.eps,
                         .weight_decay = 0,
                         .rate = options_.rate});
  for (size_t i = 0; i < groups_.size(); ++i) {
    const ParamGroup& group = groups_[i];
    const AdamWStep step{group.lr * lr_factor_, options_.beta1, options_.beta2, options_.eps,
                         group.weight_decay};
    for (size_t j = 0; j < group.params.size(); ++j) {
      Tensor p = group.params[j];
      if (!g.contains(p)) continue;
      on(p).adamw(p, moments_[i][j].m, moments_[i][j].v, g[p], clock_, step);
    }
  }
}

}  // namespace omq::nn
