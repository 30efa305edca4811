// BlockReport as JSON and back: report.json, and the work folder's files.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "quant/report.h"

namespace omq {

// Keys in seconds or bytes of memory differ from run to run; all others do not.
nlohmann::json block_json(const quant::BlockReport& report);
// Throws Error when a field is missing or of the wrong type. Reports of versions that did not look
// at linears have none; a block that is restored from such a one fills them again.
quant::BlockReport block_from_json(const nlohmann::json& j);

// Indented, arrays of plain values on one line.
std::string readable(const nlohmann::json& j);

}  // namespace omq
