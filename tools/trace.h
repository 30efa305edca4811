// The trace of one group of weights: from w to the bytes that are stored, and back.
//
// A trace is data first: one JSON object whose "steps" hold the numbers of each step, its equation,
// the function that computed it and the test that holds it. print_trace() makes a page of it.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "quant/recipe.h"

namespace omq {

// One group of one row.
struct TraceOf {
  int layer = 0;
  std::string linear = "q_proj";  // or "self_attn.q_proj"
  int64_t row = 0, group = 0;
};

// model: a checkpoint of dense weights, packed: a folder or file of omq-quant; one of them may be
// empty. Without `packed` the group is quantised here by `recipe`, as calibration would start (none
// is done); with it, the stored grid and codes are shown. Throws Error naming what does not exist,
// or does not fit together.
nlohmann::json trace(const TraceOf& of, const std::filesystem::path& model,
                     const std::filesystem::path& packed, const quant::Recipe& recipe);

// In 100 columns, on stdout. show: how many of the group's columns (0: all).
void print_trace(const nlohmann::json& trace, int64_t show);

}  // namespace omq
