// The page of a report: report.json as one HTML file that needs nothing else, neither network nor
// scripts, for reading and for print.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace omq {

// What the report does not hold is said in its place. Throws Error, opened by `name`, when it is
// not a report of omq-quant, or a block in it cannot be understood.
std::string report_page(const nlohmann::json& report, std::string_view name);

}  // namespace omq
