// --memory-limit SIZE, and the plan that is printed before a calibration begins.
#pragma once

#include <string>
#include <string_view>

#include "models/config.h"
#include "quant/plan.h"

namespace omq::cli {

// "24G", "512M", "1.5GiB", "1000000000": bytes; K, M and G are powers of 1024. Throws UsageError.
size_t parse_memory(std::string_view text);

// The matrices of a block of this model.
quant::PlanShapes plan_shapes(const ModelConfig& config, int64_t windows, int64_t tokens);

// "a block 2.6 GiB on cuda:0, samples 12.0 GiB in host memory (limit 24.0 GiB)"
std::string plan_text(const quant::MemoryPlan& plan, Device device, size_t limit);

}  // namespace omq::cli
