// See hessian.h.
#include "quant/hessian.h"

#include "autograd/ops.h"

namespace omq::quant {
namespace {

std::unique_ptr<nn::Block> on_device(const nn::Block& block, const CommitData& data) {
  auto there = block.clone();
  nn::move_to(*there, data.at.index.device());
  return there;
}

void run_window(const nn::Block& block, const CommitData& data, int64_t i) {
  const Tensor window = slice(data.x, 0, i, i + 1);
  block.forward(to(window, data.at.index.device()), data.at);
}

// Calls see(input) for the input of linear i, behind whatever looks at it or rotates it.
void watch(nn::Block& block, size_t i, std::function<void(const Tensor&)> see) {
  nn::Linear& linear = *block.linears().at(i).linear;
  linear.pre = [see = std::move(see), pre = linear.pre](const Tensor& x) {
    const Tensor y = pre ? pre(x) : x;
    see(y);
    return y;
  };
}

}  // namespace

Stages stages_of(const nn::Block& block, const CommitData& data) {
  NoGrad off;
  const auto watched = on_device(block, data);
  std::vector<Tensor> inputs(watched->linears().size());  // alive, so that addresses differ
  for (size_t i = 0; i < inputs.size(); ++i)
    watch(*watched, i, [&inputs, i](const Tensor& x) { inputs[i] = x; });
  run_window(*watched, data, 0);
  Stages stages;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (i > 0 && inputs[i].raw() == inputs[i - 1].raw())
      stages.back().push_back(i);
    else
      stages.push_back({i});
  }
  return stages;
}

Tensor hessian_of(const nn::Block& block, size_t i, const CommitData& data) {
  NoGrad off;
  const auto watched = on_device(block, data);
  const std::optional<RowQuant> quant = watched->linears().at(i).linear->input_quant;
  const int64_t windows = data.x.dim(0);
  Tensor sum;
  watch(*watched, i, [&](const Tensor& x) {
    const Tensor rows = reshape(quant ? fake_quant_rows(x, *quant) : x, {-1, x.dim(-1)});
    const Tensor products =
        matmul(transpose(rows, 0, 1), rows) * (2.0 / static_cast<double>(rows.dim(0) * windows));
    sum = sum.defined() ? sum + products : products;
  });
  for (int64_t w = 0; w < windows; ++w) {
    if (data.poll) data.poll();
    run_window(*watched, data, w);
  }
  return to(sum, Device{});
}

}  // namespace omq::quant
