// The tables of a report's page, as HTML. What a report lacks is left out or said.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "tools/report_figures.h"

namespace omq {

std::string evaluation_table(const nlohmann::json& report);
std::string files_table(const nlohmann::json& report);
std::string error_means(const BlockReports& blocks);    // a row for each kind of linear
std::string error_details(const BlockReports& blocks);  // folded: a row for each block
std::string block_details(const BlockReports& blocks);  // folded: loss, time, memory
std::string recoveries_table(const BlockReports& blocks);

}  // namespace omq
