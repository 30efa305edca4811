// Values of a report, and the head of its page: title, large numbers, settings.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace omq {

// The value at "recipe.calibration.tokens"; nothing when it is missing or null.
const nlohmann::json* value_at(const nlohmann::json& j, std::string_view path);
std::optional<double> number_at(const nlohmann::json& j, std::string_view path);
// For people, unescaped: strings as they are, "yes", "0.01", "lwc 0.01, let 0.005"; "" for nothing.
std::string text_at(const nlohmann::json& j, std::string_view path);
// Without its folders.
std::string file_name(const std::string& path);

// <p class="missing">…</p>
std::string missing(std::string_view sentence);

std::string headline(const nlohmann::json& report, size_t blocks);
std::string settings_table(const nlohmann::json& report);

}  // namespace omq
