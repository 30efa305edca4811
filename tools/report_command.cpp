// See report_command.h.
#include "tools/report_command.h"

#include <unistd.h>
#include <CLI/CLI.hpp>

#include "models/atomic_dir.h"
#include "models/json_file.h"
#include "tools/report_html.h"

namespace omq {

namespace fs = std::filesystem;

void check_page_path(const fs::path& page, const fs::path& out) {
  std::error_code error;
  const fs::path folder = page.has_parent_path() ? page.parent_path() : fs::path(".");
  check(page.has_filename() && !fs::is_directory(page, error),
        "page {}: a folder; give the name of a file in it", page.string());
  // So that no slip of the hand puts a page in the place of a model.
  check(page.extension() == ".html" || page.extension() == ".htm",
        "page {}: a page's name ends in .html", page.string());
  if (!out.empty() && fs::weakly_canonical(folder, error) == fs::weakly_canonical(out, error))
    return;
  check(fs::is_directory(folder, error), "page {}: there is no folder {}", page.string(),
        folder.string());
  check(::access(folder.c_str(), W_OK) == 0, "page {}: folder {} cannot be written to",
        page.string(), folder.string());
}

void write_page(const fs::path& page, const nlohmann::json& report, std::string_view name) {
  const std::string html = report_page(report, name);
  AtomicFile file(page);
  file.write(html);
  file.commit();
  fmt::print(stderr, "page: {}\n", page.string());
}

int report_command(const cli::Args& args) {
  CLI::App app("Makes a page for people of the report.json of a run.", "omq-quant report");
  fs::path input, page;
  app.add_option("report", input, "folder that omq-quant wrote, or a report.json")
      ->type_name("OUT|FILE");
  app.add_option("-o,--output", page, "page to write: one HTML file that needs nothing else")
      ->type_name("FILE.html");
  if (!cli::parse(app, args)) return 0;
  if (input.empty())
    throw cli::UsageError("report: which one? give the folder of a run, or its report.json");
  if (page.empty()) throw cli::UsageError("report: -o FILE.html is missing");
  std::error_code error;
  if (fs::is_directory(input, error)) input /= "report.json";
  const nlohmann::json report = read_json_object(input);
  check(!fs::equivalent(input, page, error), "page {}: is the report itself; choose another name",
        page.string());
  check_page_path(page);
  write_page(page, report, input.string());
  return 0;
}

}  // namespace omq
