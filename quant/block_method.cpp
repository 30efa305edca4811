// The recipe's pieces on one block: what is quantised while it learns, and what is committed.
#include <algorithm>
#include <cmath>

#include "autograd/compute.h"
#include "autograd/ops.h"
#include "nn/packed_weight.h"
#include "quant/activations.h"
#include "quant/calibrate.h"
#include "quant/recovery.h"

namespace omq::quant {
namespace {

Tensor f16_rounded(const Tensor& scale) { return to(to(scale, DType::F16), DType::F32); }

// A parameter of its own memory.
Tensor learnable_copy(const Tensor& t) {
  Tensor copy = Tensor::empty(t.shape(), wide_dtype(t.dtype()), t.device());
  on(copy).copy(copy, t.detach());
  return parameter(copy);
}

// "input_layernorm" of the norm whose gain this is.
std::string norm_name(nn::Block& b, const nn::RMSNorm& norm) {
  std::string found = "norm";
  b.visit([&](std::string_view name, Tensor& t) {
    if (&t == &norm.weight) found = name.substr(0, name.rfind('.'));
  });
  return found;
}

// w [rows, cols] as codes on a grid whose scales are f16 values.
std::shared_ptr<nn::PackedIntWeight> pack(const Tensor& w, const Grid& grid, const Rounder& rounder,
                                          const GroupSpec& spec, const Tensor& hessian) {
  check(all_finite(w), "a weight is not finite");
  check(all_finite(grid.scale), "the scales are not finite; lower the learning rate");
  const Tensor codes = rounder.codes(w, grid, spec, hessian);
  return std::make_shared<nn::PackedIntWeight>(
      pack_codes(codes, grid.scale, grid.zero, stored_spec(spec)));
}

}  // namespace

BlockMethod::BlockMethod(const Recipe& recipe, nn::Block& fp, const BlockStats& stats)
    : recipe_(recipe) {
  NoGrad off;
  const TrainPlan& plan = recipe.train;
  for (const auto& make : recipe.transforms) transforms_.push_back(make(fp, stats));
  for (const auto& [name, linear] : fp.linears()) {
    linears_.push_back(name);
    if (plan.weights) weights_.push_back(learnable_copy(linear->dense()));
  }
  if (plan.norms) {
    const std::vector<nn::Site> sites = fp.sites();
    for (size_t i = 0; i < sites.size(); ++i)
      if (const auto* site = std::get_if<nn::NormToLinears>(&sites[i])) {
        const Tensor& gain = site->norm->weight;
        if (!gain.defined()) continue;
        gains_.push_back({i, norm_name(fp, *site->norm),
                          parameter(Tensor::full(gain.shape(), 1, gain.dtype(), gain.device()))});
      }
  }
  if (plan.act_clips) start_act_clips(fp);
  const auto start = transformed(fp);
  for (const auto& [name, linear] : start->linears()) {
    const Tensor w = linear->dense();
    clips_.push_back(recipe.clip(w, recipe.spec.weight()));
    if (plan.rounding)
      offsets_.push_back(parameter(Tensor::zeros(w.shape(), wide_dtype(w.dtype()), w.device())));
  }
}

void BlockMethod::each_group(
    const std::function<void(const std::string&, nn::ParamGroup)>& see) const {
  const TrainPlan& plan = recipe_.train;
  if (plan.clips)
    for (size_t i = 0; i < transforms_.size(); ++i)
      see(fmt::format("transform{}", i), transforms_[i]->params());
  for (size_t i = 0; i < linears_.size(); ++i) {
    if (plan.clips) see(linears_[i], clips_[i]->params());
    if (plan.weights)
      see(linears_[i], {.name = "weights", .params = {weights_[i]}, .names = {"weight"}});
    if (plan.rounding)
      see(linears_[i], {.name = "rounding", .params = {offsets_[i]}, .names = {"offset"}});
  }
  for (size_t i = 0; i < act_logits_.size(); ++i)
    if (i == 0 || act_logits_[i].raw() != act_logits_[i - 1].raw())
      see(linears_[i], {.name = "lac", .params = {act_logits_[i]}, .names = {"clip_logit"}});
  for (const Gain& g : gains_)
    see(g.norm, {.name = "norms", .params = {g.factor}, .names = {"gain"}});
}

std::vector<nn::ParamGroup> BlockMethod::param_groups() const {
  std::vector<nn::ParamGroup> groups;
  each_group([&](const std::string&, nn::ParamGroup g) {
    if (g.params.empty()) return;
    auto rate = recipe_.train.lr.find(g.name);
    check(rate != recipe_.train.lr.end(), "recipe {}: no learning rate for \"{}\"", recipe_.name,
          g.name);
    g.lr = rate->second;
    g.weight_decay = recipe_.train.weight_decay;
    groups.push_back(std::move(g));
  });
  return groups;
}

std::vector<Learnable> BlockMethod::learnables() const {
  std::vector<Learnable> all;
  each_group([&](const std::string& owner, const nn::ParamGroup& g) {
    for (size_t i = 0; i < g.params.size(); ++i)
      all.push_back({fmt::format("{}.{}.{}", owner, g.name,
                                 i < g.names.size() ? g.names[i] : std::to_string(i)),
                     g.params[i]});
  });
  return all;
}

bool BlockMethod::starts_from_inputs() const {
  return std::any_of(clips_.begin(), clips_.end(),
                     [](const auto& clip) { return clip->starts_from_inputs(); });
}

void BlockMethod::start(const nn::Block& fp, const Tensor& x, const nn::Positions& at) const {
  NoGrad off;
  const auto block = transformed(fp);
  const std::vector<Tensor> inputs = linear_inputs(*block, x, at);
  const auto linears = block->linears();
  for (size_t i = 0; i < linears.size(); ++i)
    clips_[i]->start(to(linears[i].linear->dense(), DType::F32),
                     reshape(inputs[i], {-1, inputs[i].dim(-1)}));
}

// ---- while it learns ----

void BlockMethod::apply_gains(nn::Block& b) const {
  const std::vector<nn::Site> sites = b.sites();
  for (const Gain& g : gains_) {
    nn::RMSNorm& norm = *std::get<nn::NormToLinears>(sites.at(g.site)).norm;
    norm.weight = norm.weight * g.factor;
  }
}

// From the share that is fixed elsewhere; the whole range as FlatQuant does, from σ(4).
void BlockMethod::start_act_clips(nn::Block& fp) {
  const double share = recipe_.spec.act_clip;
  const double logit = share < 1 ? std::log(share / (1 - share)) : 4.0;
  const std::vector<nn::Site> sites = fp.sites();
  const auto read_alike = [&](const nn::Linear* a, const nn::Linear* b) {
    return std::any_of(sites.begin(), sites.end(), [&](const nn::Site& s) {
      const auto* norm = std::get_if<nn::NormToLinears>(&s);
      const auto in = [&](const nn::Linear* l) {
        return std::count(norm->consumers.begin(), norm->consumers.end(), l) > 0;
      };
      return norm && in(a) && in(b);
    });
  };
  const nn::Linear* before = nullptr;
  for (const auto& [name, linear] : fp.linears()) {
    const Tensor& w = linear->dense();
    const bool shared = before && read_alike(before, linear);
    act_logits_.push_back(
        shared ? act_logits_.back()
               : parameter(Tensor::full({1}, logit, wide_dtype(w.dtype()), w.device())));
    before = linear;
  }
}

void BlockMethod::apply_act_clips(nn::Block& b) const {
  const auto linears = b.linears();
  Tensor share;
  for (size_t i = 0; i < act_logits_.size(); ++i) {
    if (i == 0 || act_logits_[i].raw() != act_logits_[i - 1].raw()) share = sigmoid(act_logits_[i]);
    linears[i].linear->input_clip = share;
  }
}

void BlockMethod::fix_act_clips(nn::Block& b) const {
  const auto linears = b.linears();
  for (size_t i = 0; i < act_logits_.size(); ++i) {
    nn::Linear& l = *linears[i].linear;
    const double share = to(l.input_clip.detach(), DType::F64).item<double>();
    check(share > 0 && share <= 1, "{}: a share of {} of its input's range", linears[i].name,
          share);
    l.input_quant->clip = share;
    l.input_clip = {};
  }
}

std::unique_ptr<nn::Block> BlockMethod::transformed(const nn::Block& fp) const {
  auto block = fp.clone();
  for (const auto& t : transforms_) {
    t->project();
    t->apply(*block);
  }
  quantize_activations(*block, recipe_.spec);
  apply_act_clips(*block);
  return block;
}

std::unique_ptr<nn::Block> BlockMethod::student(const nn::Block& fp) const {
  const auto block = fp.clone();
  const auto linears = block->linears();
  for (size_t i = 0; i < weights_.size(); ++i) linears[i].linear->weight = weights_[i];
  if (!recipe_.train.after_rounding) apply_gains(*block);
  return transformed(*block);
}

Tensor BlockMethod::with_offsets(size_t linear, const Tensor& w, const Grid& g) const {
  if (offsets_.empty()) return w;
  return to(w, wide_dtype(w.dtype())) +
         offsets_[linear] * repeat_groups(g.scale, w.dim(1), recipe_.spec.weight());
}

std::unique_ptr<nn::Block> BlockMethod::quantized(const nn::Block& fp) const {
  auto block = rounded_ ? rounded_->simulated->clone() : student(fp);
  const auto linears = block->linears();
  for (size_t i = 0; i < linears.size() && !rounded_; ++i) {
    const GroupSpec spec = recipe_.spec.weight();
    const Tensor w = linears[i].linear->dense();
    if (offsets_.empty()) {
      linears[i].linear->weight = clips_[i]->quantized(w, spec);
      continue;
    }
    const Grid grid = clips_[i]->grid(w);
    linears[i].linear->weight = clips_[i]->on_grid(with_offsets(i, w, grid), grid, spec);
  }
  if (recipe_.train.after_rounding) apply_gains(*block);
  return block;
}

// ---- once it has learned ----

std::shared_ptr<nn::PackedWeight> BlockMethod::rounded(size_t linear, const Tensor& w,
                                                       const Tensor& hessian) const {
  return with_context("packing " + linears_[linear], [&] {
    Grid grid = clips_[linear]->grid(w);
    grid.scale = f16_rounded(grid.scale);
    return pack(with_offsets(linear, w, grid), grid, *recipe_.rounder, recipe_.spec.weight(),
                hessian);
  });
}

BlockMethod::Committed BlockMethod::round(const nn::Block& fp, const CommitData* data) const {
  Committed out{student(fp), nullptr};
  out.packed = out.simulated->clone();
  fix_act_clips(*out.packed);
  apply_act_clips(*out.packed);  // for the file
  fix_act_clips(*out.simulated);
  const auto dense = out.simulated->linears(), packed = out.packed->linears();
  const auto store = [&](size_t i, const Tensor& hessian) {
    const auto weight = rounded(i, dense[i].linear->dense(), hessian);
    dense[i].linear->weight = weight->dequantize();
    packed[i].linear->weight = weight;
  };
  if (!recipe_.rounder->wants_hessian()) {
    for (size_t i = 0; i < dense.size(); ++i) store(i, {});
    return out;
  }
  check(data != nullptr, "method {}: rounding needs calibration text", recipe_.name);
  for (const auto& stage : stages_of(*out.simulated, *data)) {
    const Tensor hessian = hessian_of(*out.simulated, stage.front(), *data);
    for (const size_t i : stage) store(i, hessian);
  }
  return out;
}

BlockMethod::Committed BlockMethod::commit(const nn::Block& fp, const CommitData* data) const {
  NoGrad off;
  Committed out = rounded_ ? Committed{rounded_->simulated->clone(), rounded_->packed->clone()}
                           : round(fp, data);
  if (recipe_.train.after_rounding) {
    apply_gains(*out.simulated);
    apply_gains(*out.packed);
  }
  return out;
}

void BlockMethod::fix_rounding(const nn::Block& fp, const CommitData* data) {
  NoGrad off;
  rounded_ = round(fp, data);
}

void BlockMethod::take_rounding(const BlockMethod& from, Device device) {
  rounded_ = Committed{from.rounded_->simulated->clone(), nullptr};
  nn::move_to(*rounded_->simulated, device);
}

std::shared_ptr<nn::PackedWeight> pack_nearest(const Tensor& w, const QuantSpec& spec) {
  NoGrad off;
  const GroupSpec group = spec.weight();
  Grid grid = minmax_clip(w, group)->grid(w);
  if (all_finite(grid.scale)) grid.scale = f16_rounded(grid.scale);
  return pack(w, grid, *round_nearest(), group, {});
}

}  // namespace omq::quant
