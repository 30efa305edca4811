// See recovery.h.
#include "quant/recovery.h"

#include "autograd/ops.h"

namespace omq::quant {

// 0 · x is NaN where x is NaN or infinite.
bool all_finite(const Tensor& x) {
  NoGrad off;
  const bool narrow = x.dtype() == DType::BF16 || x.dtype() == DType::F16;
  const Tensor zero = sum((narrow ? to(x, DType::F32) : x.detach()) * 0.0);
  return x.dtype() == DType::F64 ? zero.item<double>() == 0.0 : zero.item<float>() == 0.0f;
}

Snapshot::Snapshot(const std::vector<Learnable>& learnables) {
  for (const Learnable& l : learnables) {
    now_.push_back(l.value);
    Tensor copy = empty_like(l.value);
    on(copy).copy(copy, l.value.detach());
    then_.push_back(std::move(copy));
  }
}

void Snapshot::restore() const {
  for (size_t i = 0; i < now_.size(); ++i) {
    Tensor t = now_[i].detach();
    on(t).copy(t, then_[i]);
  }
}

bool assign(const std::vector<Learnable>& learnables, const std::vector<Learnable>& values) {
  if (learnables.size() != values.size()) return false;
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor &to = learnables[i].value, &from = values[i].value;
    if (learnables[i].name != values[i].name || to.shape() != from.shape() ||
        to.dtype() != from.dtype())
      return false;
  }
  for (size_t i = 0; i < values.size(); ++i) transfer(learnables[i].value, values[i].value);
  return true;
}

namespace {

// Runs the block with every linear layer watched; the first layer with a number that is none.
std::string first_bad_layer(const nn::Block& block, const Tensor& x, const nn::Positions& at) {
  std::string found;
  const auto watched = block.clone();
  for (const auto& [name, linear] : watched->linears()) {
    const nn::Linear plain = *linear;  // shares every Storage
    linear->pre = [&found, name = name, plain](const Tensor& input) {
      const Tensor seen = plain.pre ? plain.pre(input) : input;
      const nn::Linear bare = plain.product();
      if (!found.empty()) return seen;
      const auto& s = plain.input_quant;
      if (!all_finite(input))
        found = "input of " + name;
      else if (s && !all_finite(fake_quant_rows(seen, *s)))
        found = "quantised input of " + name;
      else if (!all_finite(bare(seen)))
        found = "output of " + name;
      return seen;
    };
  }
  const Tensor y = watched->forward(x, at);
  return !found.empty() ? found : all_finite(y) ? "" : "output of the block";
}

}  // namespace

Culprit first_not_finite(nn::Block& fp, const nn::Block& quantized,
                         const std::vector<Learnable>& learnables, const Tensor& x,
                         const Targets& targets, const nn::Positions& at) {
  NoGrad off;
  std::string found;
  const auto look = [&found](const char* what, std::string_view name, const Tensor& t) {
    if (found.empty() && t.defined() && !all_finite(t))
      found = name.empty() ? what : fmt::format("{} {}", what, name);
  };
  fp.visit([&](std::string_view name, Tensor& t) { look("tensor", name, t); });
  look("the inputs of the block", "", x);
  look("the full-precision outputs of the block", "", targets.of_fp);
  look("the full-precision outputs on quantised inputs", "", targets.of_quant);
  if (!found.empty()) return {found, true};
  for (const Learnable& l : learnables) look("learnable", l.name, l.value);
  const auto copy = quantized.clone();
  copy->visit([&](std::string_view name, Tensor& t) { look("quantised", name, t.detach()); });
  if (found.empty()) found = first_bad_layer(*copy, x, at);
  return {found.empty() ? "the loss itself" : found, false};
}

}  // namespace omq::quant
