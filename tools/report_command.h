// Pages of reports as omq-quant makes them: `--report FILE.html` at the end of a run, and
// `omq-quant report OUT|report.json -o FILE.html` at any later time.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>

#include "tools/cli.h"

namespace omq {

// Throws Error when a page could not be written there, so that a run does not end in it after
// hours. `out`: a folder that will exist by then.
void check_page_path(const std::filesystem::path& page, const std::filesystem::path& out = {});

// Writes the page of `report`, whole or not at all, and says so on stderr. name: of the report, for
// messages.
void write_page(const std::filesystem::path& page, const nlohmann::json& report,
                std::string_view name);

// `omq-quant report`; args without that word. Returns the exit code.
int report_command(const cli::Args& args);

}  // namespace omq
