// The two executors of a DecodePlan: our pool on the CPU, a recorded graph on a device.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/decode_plan.h"
#include "tensor/row_products.h"

namespace omq {

struct DecodePlan::Impl {
  virtual ~Impl() = default;
  // The tokens, one a sequence, which stand at position `at`, are known and the caches have room.
  virtual void step(std::span<const int32_t> tokens, int64_t at,
                    std::vector<nn::KVCache>& caches) = 0;
  virtual std::span<const float> logits() = 0;  // [B, V]
  // step(), then the ids of the tokens that follow, or what is told instead (kChosenNaN,
  // kChosenNothing). chosen: not the tokens.
  virtual void choose(std::span<const int32_t> tokens, int64_t at, std::vector<nn::KVCache>& caches,
                      std::span<int32_t> chosen) = 0;
  virtual bool can_choose(const SamplerOptions& sampling) const = 0;
  virtual void choose_by(const SamplerOptions& sampling, int64_t at,
                         std::span<const double> numbers) = 0;
};

std::unique_ptr<DecodePlan::Impl> cpu_decode_plan(const Model& model, int64_t capacity,
                                                  int64_t batch);
std::unique_ptr<DecodePlan::Impl> device_decode_plan(const Model& model, int64_t capacity,
                                                     int64_t batch);
// What the device's kernels cannot run, beyond what no plan can: "" when nothing.
std::string device_plan_unsupported(const Model& model);

// The linear's matrix as the products take it. Its weight is supported.
RowMatrix row_matrix(const nn::Linear& linear);

}  // namespace omq
