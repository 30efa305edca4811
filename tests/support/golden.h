// Tensors of tests/golden/*.safetensors for tests of layers that may not link models/: the files
// are our own, so this reads them and no others.
//
//   const auto golden = load_golden("ops");
//   if (!golden) { MESSAGE("skipped: no tests/golden/ops.safetensors"); return; }
#pragma once

#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "tensor/tensor.h"
#include "tests/support/shared.h"

namespace omq {

using Golden = std::map<std::string, Tensor>;  // read-only mapped tensors, F32 or I32

inline std::optional<Golden> load_golden(const std::string& name) {
  const std::filesystem::path file = source_path("tests/golden/" + name + ".safetensors");
  std::error_code ignored;
  if (!std::filesystem::exists(file, ignored)) return std::nullopt;
  const auto storage = Storage::map(file, 0, static_cast<size_t>(std::filesystem::file_size(file)));
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, storage->data(), sizeof header_bytes);
  const char* text = static_cast<const char*>(storage->data()) + 8;
  const nlohmann::json header = nlohmann::json::parse(text, text + header_bytes);
  Golden golden;
  for (const auto& [key, entry] : header.items()) {
    if (key == "__metadata__") continue;
    const std::string dtype = entry.at("dtype");
    check(dtype == "F32" || dtype == "I32", "golden {}: {} is {}", name, key, dtype);
    Shape shape;
    for (int64_t n : entry.at("shape")) shape.push_back(n);
    const size_t begin = entry.at("data_offsets").at(0);
    golden[key] = Tensor::view(storage, 8 + header_bytes + begin, shape,
                               dtype == "F32" ? DType::F32 : DType::I32);
  }
  return golden;
}

}  // namespace omq
