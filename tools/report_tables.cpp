// See report_tables.h.
#include "tools/report_tables.h"

#include <fmt/format.h>

#include <cmath>

#include "tools/cli.h"
#include "tools/report_settings.h"
#include "tools/report_svg.h"

namespace omq {

using nlohmann::json;
using quant::BlockReport;
using quant::LinearReport;
using svg::escaped;

namespace {

// Cells of one row; those from `right` on are numbers.
std::string row(const std::vector<std::string>& cells, size_t right, const char* cell = "td") {
  std::string out = "<tr>";
  for (size_t i = 0; i < cells.size(); ++i)
    out += fmt::format("<{0}{1}>{2}</{0}>", cell, i >= right ? " class=\"right\"" : "",
                       escaped(cells[i]));
  return out + "</tr>\n";
}
std::string table(const std::vector<std::string>& head, size_t right, const std::string& rows,
                  const char* style = "") {
  return fmt::format(
      "<div class=\"scroll\"><table{}>\n<thead>{}</thead>\n<tbody>\n{}</tbody>\n</table></div>\n",
      *style ? fmt::format(" class=\"{}\"", style) : "", row(head, right, "th"), rows);
}
std::string folded(const std::string& summary, const std::string& content) {
  return fmt::format("<details><summary>{}</summary>\n{}</details>\n", escaped(summary), content);
}

}  // namespace

std::string evaluation_table(const json& report) {
  const json* list = value_at(report, "evaluation");
  if (!list || !list->is_array() || list->empty())
    return missing("No perplexity was measured; omq-quant --eval ppl:FILE does.");
  std::string rows;
  for (const json& e : *list)
    rows += row({file_name(text_at(e, "file")), text_at(e, "model"), text_at(e, "protocol"),
                 number_at(e, "windows")
                     ? fmt::format("{} × {}", text_at(e, "windows"), text_at(e, "context"))
                     : "",
                 text_at(e, "tokens"), svg::number(number_at(e, "perplexity").value_or(NAN), 6)},
                3);
  return table({"Text", "Model", "Protocol", "Windows", "Tokens", "Perplexity"}, 3, rows);
}

std::string files_table(const json& report) {
  std::string rows;
  const auto add = [&rows](const std::string& what, const std::string& name,
                           std::optional<double> bytes, const std::string& hash) {
    if (hash.empty()) return;
    rows += fmt::format(
        "<tr><td>{}</td><td class=\"name\">{}</td><td class=\"right\">{}</td>"
        "<td class=\"hash\">{}</td></tr>\n",
        escaped(what), escaped(name), bytes ? escaped(cli::human_bytes(*bytes)) : "",
        escaped(hash));
  };
  const auto list = [&](const char* key) {
    const json* l = value_at(report, key);
    return l && l->is_array() ? *l : json::array();
  };
  for (const json& f : list("source"))
    add("source", text_at(f, "file"), number_at(f, "bytes"), text_at(f, "sha256"));
  add("calibration", "token ids", {}, text_at(report, "recipe.calibration.ids_sha256"));
  for (const json& e : list("evaluation"))
    add("evaluation", file_name(text_at(e, "file")), {}, text_at(e, "file_sha256"));
  add("result", "model.safetensors", {}, text_at(report, "model_sha256"));
  if (rows.empty()) return missing("The report does not name the files.");
  return "<div class=\"scroll\"><table>\n<thead><tr><th></th><th>File</th><th "
         "class=\"right\">Size</th><th>SHA-256</th></tr></thead>\n<tbody>\n" +
         rows + "</tbody>\n</table></div>\n";
}

std::string error_means(const BlockReports& blocks) {
  const bool both = beyond_nearest(blocks);
  std::string rows;
  for (const std::string& kind : linear_kinds(blocks)) {
    double before = 0, after = 0, n = 0;
    for (const BlockReport& b : blocks)
      if (const LinearReport* l = find_linear(b, kind)) {
        before += l->error_nearest;
        after += l->error;
        ++n;
      }
    std::vector<std::string> cells{short_name(kind), svg::number(before / n)};
    if (both) {
      cells.push_back(svg::number(after / n));
      cells.push_back(before > 0 ? fmt::format("{:.2f}", after / before) : "–");
    }
    rows += row(cells, 1);
  }
  if (rows.empty()) return "";
  std::vector<std::string> head{"Mean over the blocks", "Round to nearest"};
  if (both) head.insert(head.end(), {"Committed", "Ratio"});
  return table(head, 1, rows);
}

std::string error_details(const BlockReports& blocks) {
  const std::vector<std::string> kinds = linear_kinds(blocks);
  if (kinds.empty()) return "";
  const bool both = beyond_nearest(blocks);
  std::vector<std::string> head{"Block"};
  for (const std::string& k : kinds) head.push_back(short_name(k));
  std::string rows;
  for (size_t i = 0; i < blocks.size(); ++i) {
    std::vector<std::string> cells{std::to_string(i)};
    for (const std::string& k : kinds) {
      const LinearReport* l = find_linear(blocks[i], k);
      cells.push_back(!l ? "–" : svg::number(l->error_nearest));
      if (l && both) cells.back() += " → " + svg::number(l->error);
    }
    rows += row(cells, 1);
  }
  return folded(
      both ? "Errors of every block: round to nearest → committed" : "Errors of every block",
      table(head, 1, rows, "dense"));
}

std::string block_details(const BlockReports& blocks) {
  std::string rows;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const BlockReport& b = blocks[i];
    const bool learned = !b.epoch_loss.empty();
    rows += row({std::to_string(i), b.name, learned ? svg::number(b.epoch_loss.front()) : "–",
                 learned ? svg::number(b.epoch_loss.back()) : "–",
                 b.target_mean_square > 0 ? svg::number(b.committed_loss) : "–",
                 b.target_mean_square > 0 ? svg::number(b.target_mean_square) : "–",
                 svg::number(b.packed_error, 2), cli::human_seconds(b.seconds),
                 cli::human_bytes(static_cast<double>(b.peak_bytes))},
                2);
  }
  if (rows.empty()) return "";
  return folded("Numbers of every block",
                table({"", "Block", "First loss", "Last loss", "Committed", "Target m.s.",
                       "Kernel error", "Time", "Memory"},
                      2, rows, "dense"));
}

std::string recoveries_table(const BlockReports& blocks) {
  std::string rows;
  for (const BlockReport& b : blocks)
    for (const quant::Recovery& r : b.recoveries)
      rows +=
          row({b.name, std::to_string(r.epoch), r.tensor, fmt::format("{:g}", r.rate_factor)}, 3);
  if (rows.empty()) return "";
  return table({"Block", "Epoch", "First tensor that was not finite", "Rates times"}, 3, rows);
}

}  // namespace omq
