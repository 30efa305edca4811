// The steps of a trace, each as a JSON object: title, equation, function, file and test, and the
// numbers of one group. What trace.cpp puts in a row.
#pragma once

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "quant/clip.h"
#include "tensor/packed.h"

namespace omq::lesson {

// One group of one row of a matrix.
struct Group {
  std::string module;  // "model.layers.3.self_attn.q_proj"
  int64_t rows = 0, cols = 0, row = 0, group = 0;
  GroupSpec spec;  // as quantised, before the stored width is rounded up
  int64_t panel() const { return row / kPanelRows; }
  int64_t in_panel() const { return row % kPanelRows; }
  int64_t begin() const { return group * spec.group_cols(cols); }  // its columns
  int64_t end() const { return std::min(cols, begin() + spec.group_cols(cols)); }
};

// The rows of the group's panel: [≤ 16, cols], grids [≤ 16, groups].
struct Result {
  PackedInt panel;
  Tensor codes, scale, zero;
  Tensor dequantised;  // what kernels make of the bytes
};

// Where the packed matrix lies.
struct FilePlace {
  std::filesystem::path file;
  int64_t tensor_at = 0;  // bytes from the start of the file
};

nlohmann::json weights_step(const Tensor& w, const std::string& source, const Group& g);
nlohmann::json range_step(const Tensor& w, const Group& g);
// γ and β where calibration starts; both 1 for a clip that learns nothing.
nlohmann::json clipping_step(const quant::Clip& clip, const nlohmann::json& range, const Group& g);
// What a stored grid says of the γ and β that were learned.
nlohmann::json clipped_step(const Result& r, const nlohmann::json& range, const Group& g);
nlohmann::json grid_step(const quant::Grid& grid, const nlohmann::json& clipping, const Group& g);
// exact: before it was rounded, where that is known.
nlohmann::json scale_step(std::optional<float> exact, const Result& r, const Group& g);
nlohmann::json codes_step(const Result& r, const Group& g);
nlohmann::json place_step(const PackedInt& panel, const Group& g, const FilePlace* stored);
nlohmann::json bytes_step(const PackedInt& panel, const Group& g, const nlohmann::json& place);
// Unpacks the bytes again and proves that they are what the steps before say.
nlohmann::json back_step(const Result& r, const Group& g, const nlohmann::json& codes,
                         const nlohmann::json& place, const nlohmann::json& bytes);
// Appends to a step's "proofs".
void prove(nlohmann::json& step, const std::string& what, bool holds);

// Elements of a row that belong to the group; one entry of a grid.
template <class T> std::vector<T> of_group(const Tensor& rows, const Group& g);
float at(const Tensor& grid, const Group& g);

}  // namespace omq::lesson
