// AdamW: decoupled weight decay, one learning rate per group of parameters.
#pragma once

#include <string>
#include <vector>

#include "autograd/backward.h"
#include "tensor/rate_schedule.h"

namespace omq::nn {

struct ParamGroup {
  std::string name;            // "lwc", "let": recipes set rates by this name
  std::vector<Tensor> params;  // made by parameter()
  double lr = 1e-3;
  double weight_decay = 0;
  std::vector<std::string> names = {};  // of params, for reports: "gamma_logit"
};

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  RateSchedule rate = {};  // of every group, over the steps of this optimiser
};
// β₁ = β₂ = 0: every entry moves by its rate against the sign of its gradient (SignSGD). eps lies
// below every gradient that matters, and keeps 0 where it is.
inline AdamWOptions sign_descent(RateSchedule rate) { return {0, 0, 1e-18, rate}; }

class AdamW {
 public:
  explicit AdamW(std::vector<ParamGroup> groups, AdamWOptions options = {});
  // One update in place. A parameter that the loss did not touch keeps its value and its moments.
  // With a loss [1] that is not finite nothing changes, neither now nor in any later step.
  void step(const Gradients& g, const Tensor& loss = {});
  // Multiplies every group's rate: schedules and recovery from a bad step.
  void scale_lr(double factor) { lr_factor_ *= factor; }
  void set_lr_factor(double factor) { lr_factor_ = factor; }
  const std::vector<ParamGroup>& groups() const { return groups_; }
  // How many there were; waits for the device.
  int64_t steps() const;

 private:
  struct Moments {
    Tensor m, v;
  };
  std::vector<ParamGroup> groups_;
  std::vector<std::vector<Moments>> moments_;
  AdamWOptions options_;
  double lr_factor_ = 1.0;
  Tensor clock_;  // kernels.h: what depends on the number of the step, where a device can see it
};

}  // namespace omq::nn
