// Text files and JSON texts, read with suspicion: sizes, nesting and duplicate keys are checked.
//
// nlohmann/json keeps the last of two equal keys, which lets two programs read one file
// differently; here that is an error, as the safetensors format demands (spec/interop-formats.md
// §7).
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace omq {

// The whole file. Throws Error when it is missing, not a regular file, or larger than max_bytes.
std::string read_text_file(const std::filesystem::path& file, size_t max_bytes = size_t{256} << 20);

// Throws Error: not JSON (with the position), a key given twice, nesting deeper than 64. `name`
// opens the message.
nlohmann::json parse_json(std::string_view text, std::string_view name);

// Both; the value must be an object.
nlohmann::json read_json_object(const std::filesystem::path& file);

// j as text, indented by so many columns (−1: on one line). What is not UTF-8, as a file's name
// need not be, is replaced by U+FFFD: JSON has no other bytes.
std::string json_text(const nlohmann::json& j, int indent = -1);

// At most n characters of text for a message, control characters shown as "?" and longer text cut
// with "…".
std::string shown(std::string_view text, size_t n = 80);

}  // namespace omq
