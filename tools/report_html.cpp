// See report_html.h.
#include "tools/report_html.h"

#include <fmt/format.h>

#include "tensor/error.h"
#include "tools/report_figures.h"
#include "tools/report_json.h"
#include "tools/report_settings.h"
#include "tools/report_style.h"
#include "tools/report_svg.h"
#include "tools/report_tables.h"

namespace omq {

using nlohmann::json;

namespace {

// What a report lacks takes the value that means "not known", which the figures know to leave out.
BlockReports blocks_of(const json& report, std::string_view name) {
  BlockReports blocks;
  for (const json& j : report["blocks"]) {
    with_context(fmt::format("reading block {} of {}", blocks.size(), name), [&] {
      check(j.is_object(), "an object is expected, not {}", j.type_name());
      json whole = block_json({});
      whole.update(j);
      blocks.push_back(block_from_json(whole));
    });
    blocks.back().index = static_cast<int>(blocks.size()) - 1;
  }
  return blocks;
}

class Page {
 public:
  void add(const std::string& html) { body_ += html; }
  void section(std::string_view title) { body_ += fmt::format("<h2>{}</h2>\n", title); }
  void figure(const Figure& f) {
    if (f.svg.empty()) {
      if (!f.caption.empty()) body_ += missing(f.caption);
      return;
    }
    body_ += fmt::format(
        "<figure><div class=\"scroll\">\n{}</div>\n<figcaption>Figure {}. "
        "{}</figcaption></figure>\n",
        f.svg, ++figures_, f.caption);
  }
  // The policy is a promise that readers need not take on trust: nothing is loaded, nothing runs.
  std::string str(std::string_view title) const {
    return fmt::format(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src "
        "'unsafe-inline'\"/>\n"
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
        "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n{}</body>\n</html>\n",
        svg::escaped(title), kReportStyle, body_);
  }

 private:
  std::string body_;
  int figures_ = 0;
};

}  // namespace

std::string report_page(const json& report, std::string_view name) {
  for (const auto& [key, ok] : {std::pair{"omq_version", &json::is_string},
                                {"recipe", &json::is_object},
                                {"blocks", &json::is_array}})
    check(report.is_object() && report.contains(key) && (report[key].*ok)(),
          "{}: not a report of omq-quant: \"{}\" is missing or of another kind", name, key);
  const BlockReports blocks = blocks_of(report, name);
  Page page;
  page.add(headline(report, blocks.size()));
  page.section("Settings");
  page.add(settings_table(report));
  page.section("Perplexity");
  page.add(evaluation_table(report));
  page.section("Loss");
  page.figure(loss_by_depth(blocks));
  page.figure(loss_by_epoch(blocks));
  page.add(block_details(blocks));
  if (const std::string table = recoveries_table(blocks); !table.empty()) {
    page.section("Recoveries");
    page.add(table);
  }
  page.section("Errors of the matrices");
  page.figure(linear_errors(blocks));
  page.add(error_means(blocks));
  page.add(error_details(blocks));
  page.section("Clip factors");
  page.figure(clip_factors(blocks));
  const json& recipe = report["recipe"];
  if (!recipe.contains("transformation") || !recipe["transformation"].is_null()) {
    page.section("Transformation");
    page.figure(transformation_sites(blocks));
  }
  page.section("Time and memory");
  page.figure(cost_by_depth(blocks));
  page.section("Files");
  page.add(files_table(report));
  page.add(fmt::format("<p class=\"under\">omq {}</p>\n",
                       svg::escaped(report["omq_version"].get<std::string>())));
  return page.str(
      fmt::format("{} {}", text_at(report, "model.name"), text_at(report, "recipe.setting")));
}

}  // namespace omq
