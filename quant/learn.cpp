// See learn.h.
#include "quant/learn.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "autograd/ops.h"
#include "quant/recovery.h"

namespace omq::quant {
namespace {

Tensor batch_of(const Tensor& stream, int64_t begin, int64_t end) {
  return stream.defined() ? slice(stream, 0, begin, end) : Tensor{};
}
Targets batch_of(const Targets& t, int64_t begin, int64_t end) {
  return {batch_of(t.of_fp, begin, end), batch_of(t.of_quant, begin, end)};
}

// Where the block computes: the device of its first matrix.
Device device_of(const nn::Block& block) {
  return block.clone()->linears().front().linear->dense().device();
}

// The tensors of a batch, in a fixed order; some may be undefined.
template <class B> auto parts(B& b) {
  return std::array{&b.x, &b.targets.of_fp, &b.targets.of_quant};
}

// Whether the last loss is below all before it.
bool is_best(const std::vector<double>& losses) {
  return std::all_of(losses.begin(), losses.end() - 1, [&](double l) { return l > losses.back(); });
}

struct Epoch {
  double loss = 0;      // mean of its steps
  int64_t failed = -1;  // first sample of the step that gave no number
};

// Passes over the samples.
class Trainer {
 public:
  Trainer(const Recipe& recipe, const BlockMethod& method, nn::Block& fp, const LearningData& data,
          const Hooks& hooks, int block)
      : recipe_(recipe), method_(method), fp_(fp), data_(data), hooks_(hooks), block_(block) {
    const int64_t steps = data.x.dim(0) / recipe.train.batch_size;
    losses_ = Tensor::zeros({steps}, DType::F32, device_of(fp));
    restart(1, 1);
  }

  // Fresh moments, at this share of the learning rates, from the start of an epoch (from 1).
  void restart(double factor, int epoch) {
    const TrainPlan& plan = recipe_.train;
    const double steps = static_cast<double>(losses_.dim(0));
    const RateSchedule rate{.shape = plan.rate_shape,
                            .steps = steps * plan.epochs,
                            .done = steps * (epoch - 1),
                            .last = plan.last_rate};
    const nn::AdamWOptions options =
        plan.sign_descent ? nn::sign_descent(rate) : nn::AdamWOptions{.rate = rate};
    const double depth = 1 + plan.depth_slope * block_ / std::max(1, data_.blocks);
    step_.reset();
    optimizer_.emplace(method_.param_groups(), options);
    optimizer_->set_lr_factor(factor * depth / (plan.sign_descent ? rate.steps : 1));
    // Gradients that left F16's range are one reason to be here: what halves rates takes 2⁴ from
    // it.
    const Batch first = samples(0);
    const double scale = std::pow(factor, 4) * loss_scale(recipe_.train.compute, first.x.numel());
    step_.emplace(recipe_, method_, fp_, *optimizer_, data_.at, first, scale);
  }

  // Nothing is learned from a loss that is no number, nor after it. On the CPU it ends the epoch at
  // once; on other devices, where it would have to be waited for, losses are looked at in the end.
  Epoch epoch() {
    const ComputeScope compute(recipe_.train.compute);
    const bool waits = losses_.device().type == DeviceType::CPU;
    const int64_t steps = losses_.dim(0);
    Batch now = samples(0);
    for (int64_t i = 0; i < steps; ++i) {
      if (hooks_.poll) hooks_.poll();
      const Batch next = samples((i + 1) % steps * recipe_.train.batch_size);
      const Tensor& loss = (*step_)(now, &next);
      now = next;
      Tensor slot = losses_.alias({1}, {1}, i);
      on(slot).copy(slot, loss);
      if (waits && !std::isfinite(loss.item<float>())) return failure(i);
    }
    double total = 0;
    const std::vector<float> losses = losses_.to_vector<float>();
    for (int64_t i = 0; i < steps; ++i) {
      const float loss = losses[static_cast<size_t>(i)];
      if (!std::isfinite(loss)) return failure(i);
      total += static_cast<double>(loss);
    }
    for (const Learnable& l : method_.learnables())
      if (!all_finite(l.value)) return {total, 0};
    return {total / static_cast<double>(steps)};
  }

  Batch samples(int64_t first) const {
    const int64_t end = first + recipe_.train.batch_size;
    return {batch_of(data_.x, first, end), batch_of(data_.targets, first, end)};
  }

 private:
  Epoch failure(int64_t step) const { return {std::nan(""), step * recipe_.train.batch_size}; }

  const Recipe& recipe_;
  const BlockMethod& method_;
  nn::Block& fp_;
  const LearningData& data_;
  const Hooks& hooks_;
  int block_;
  Tensor losses_;  // of each step of an epoch
  std::optional<nn::AdamW> optimizer_;
  std::optional<LearningStep> step_;
};

}  // namespace

double loss_scale(Compute compute, int64_t elements) {
  if (compute != Compute::F16) return 1;
  // 2⁻⁶ is room for errors and weights that are far larger than usual.
  return std::exp2(std::floor(std::log2(static_cast<double>(elements))) - 6);
}

LearningStep::LearningStep(const Recipe& recipe, const BlockMethod& method, const nn::Block& fp,
                           nn::AdamW& optimizer, const nn::Positions& at, const Batch& like,
                           double loss_scale)
    : recipe_(recipe),
      method_(method),
      fp_(fp),
      optimizer_(optimizer),
      at_(at),
      loss_(Tensor::zeros({1}, DType::F32, device_of(fp))),
      loss_scale_(loss_scale),
      graph_(loss_.device(), [this] { learn(); }) {
  const Device device = loss_.device();
  if (device.type == DeviceType::CPU) return;
  const bool arrives = like.x.device() != device;
  for (size_t i = 0; i < parts(like).size(); ++i) {
    const Tensor& t = *parts(like)[i];
    if (!t.defined()) continue;
    *parts(batch_)[i] = Tensor::empty(t.shape(), t.dtype(), device);
    if (arrives) *parts(ahead_)[i] = Tensor::empty(t.shape(), t.dtype(), device);
  }
}

// A copy that is still under way must not find its place taken by something else.
LearningStep::~LearningStep() {
  if (next_) device_api(loss_.device()).join_ahead(loss_.device().index);
}

// The batch where the step reads it. On the CPU it is read where it lies.
void LearningStep::place(const Batch& batch) {
  const Device device = loss_.device();
  if (device.type == DeviceType::CPU) {
    batch_ = batch;
    return;
  }
  const bool arrived = next_ && next_ == batch.x.raw();
  if (arrived) device_api(device).join_ahead(device.index);
  next_ = nullptr;
  for (size_t i = 0; i < parts(batch).size(); ++i) {
    Tensor& to = *parts(batch_)[i];
    if (!to.defined()) continue;
    const Tensor& from = arrived ? *parts(ahead_)[i] : *parts(batch)[i];
    if (from.device() == device)
      on(to).copy(to, from);
    else
      transfer(to, from);
  }
}

void LearningStep::learn() {
  const auto block = method_.quantized(fp_);  // ②
  const Tensor loss =
      recipe_.objective.loss(block->forward(batch_.x, at_), batch_.targets);  // ③ Eq. 1
  on(loss_).copy(loss_, loss.detach());
  const Tensor aim = recipe_.train.unit_loss ? loss / affine(loss.detach(), 1, 1e-30) : loss;
  if (loss_scale_ == 1) return optimizer_.step(backward(aim), loss_);  // ④ only Θ moves
  Gradients g = backward(aim * loss_scale_);
  g.scale(1 / loss_scale_);
  optimizer_.step(g, loss_);
}

const Tensor& LearningStep::operator()(const Batch& batch, const Batch* next) {
  place(batch);
  const Device device = loss_.device();
  if (next && ahead_.x.defined()) {
    for (size_t i = 0; i < parts(*next).size(); ++i) {
      const Tensor &to = *parts(ahead_)[i], &from = *parts(*next)[i];
      if (to.defined())
        device_api(device).copy_ahead(to.raw(), from.raw(), to.nbytes(), device.index);
    }
    next_ = next->x.raw();
  }
  graph_.run();
  return loss_;
}

void learn(const Recipe& recipe, const BlockMethod& method, nn::Block& fp, const LearningData& data,
           const Hooks& hooks, const Progress& progress, BlockReport& report,
           const std::chrono::steady_clock::time_point start) {
  const auto learnables = method.learnables();
  double factor = 1;
  Trainer trainer(recipe, method, fp, data, hooks, report.index);
  std::optional<Snapshot> best;
  for (int epoch = 1; epoch <= recipe.train.epochs; ++epoch) {
    const Snapshot before(learnables);
    for (;;) {
      const Epoch e = trainer.epoch();
      if (e.failed < 0) {
        report.epoch_loss.push_back(e.loss);
        break;
      }
      const ComputeScope compute(recipe.train.compute);
      NoGrad off;
      const auto [x, targets] = trainer.samples(e.failed);
      const Device d = device_of(fp);
      const Culprit why = first_not_finite(
          fp, *method.quantized(fp), learnables, to(x, d),
          {to(targets.of_fp, d), targets.of_quant.defined() ? to(targets.of_quant, d) : Tensor{}},
          data.at);
      check(!why.hopeless,
            "epoch {}: the loss is not finite, and no learning rate changes that: {}", epoch,
            why.tensor);
      check(report.recoveries.size() < kTries,
            "epoch {}: the loss is not finite, after {} tries at lower rates still; it begins in: "
            "{}; lower the learning rate",
            epoch, kTries, why.tensor);
      before.restore();
      factor /= 2;
      report.recoveries.push_back({epoch, factor, why.tensor});
      if (hooks.notice)
        hooks.notice(fmt::format(
            "{}: epoch {}: the loss is not finite ({}); back to the start of the epoch, learning "
            "rates times {}",
            report.name, epoch, why.tensor, factor));
      trainer.restart(factor, epoch);
    }
    if (recipe.train.keep_best && is_best(report.epoch_loss)) {
      best.emplace(learnables);
      report.kept_epoch = epoch;
    }
    report.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (progress) progress(report, epoch, recipe.train.epochs);
  }
  if (best && report.kept_epoch < recipe.train.epochs) best->restore();
}

}  // namespace omq::quant
