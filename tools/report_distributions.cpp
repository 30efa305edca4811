// Distributions over depth: for every kind of linear (or site) a strip with a column for each
// block, darker where more values lie, and beside it the sum over all blocks.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "tools/report_figures.h"
#include "tools/report_svg.h"

namespace omq {

using quant::BlockReport;
using quant::Histogram;
using svg::Axis;
using svg::Picture;

namespace {

// One strip: a histogram a block, empty where there is none.
struct Strip {
  std::vector<Histogram> blocks;
  bool empty() const {
    return std::all_of(blocks.begin(), blocks.end(), [](auto& h) { return h.counts.empty(); });
  }
};
struct Row {
  std::string name;
  std::array<Strip, 2> strips;
};
struct Column {
  const char *head, *empty;
  double also;     // a value that the axis holds too
  int digits = 2;  // of the mean
};

// The bins in which a column of strips is drawn: so wide that those of all its histograms nest in
// them and that there are no more than can be told apart.
struct Bins {
  double width = 1;
  int64_t first = 0, count = 1;
  int64_t of(double v) const { return static_cast<int64_t>(std::floor(v / width)) - first; }
  double edge(int64_t i) const { return width * static_cast<double>(first + i); }
};
Bins bins_for(const std::vector<Row>& rows, size_t column, double also) {
  constexpr int64_t kMost = 32;
  double lo = also, hi = also, narrow = 1e300, wide = 0;
  for (const Row& r : rows)
    for (const Histogram& h : r.strips[column].blocks) {
      if (h.counts.empty()) continue;
      const auto first = static_cast<double>(h.first), n = static_cast<double>(h.counts.size());
      lo = std::min(lo, h.width * first);
      hi = std::max(hi, h.width * (first + n));
      narrow = std::min(narrow, h.width);
      wide = std::max(wide, h.width);
    }
  Bins b;
  if (lo >= hi) return b;
  for (b.width = narrow;; b.width *= 2) {
    b.first = 0;
    b.first = b.of(lo);
    b.count = b.of(hi) + (b.edge(b.of(hi)) < hi ? 1 : 0);
    if (b.width >= wide && b.count <= kMost) return b;
  }
}

// The share of the block's values in each bin.
std::vector<double> shares(const Histogram& h, const Bins& bins) {
  std::vector<double> out(static_cast<size_t>(bins.count));
  double total = 0;
  for (size_t i = 0; i < h.counts.size(); ++i) {
    const double middle = h.width * (static_cast<double>(h.first) + static_cast<double>(i) + 0.5);
    const auto n = static_cast<double>(h.counts[i]);
    out[static_cast<size_t>(std::clamp(bins.of(middle), int64_t{0}, bins.count - 1))] += n;
    total += n;
  }
  for (double& v : out) v /= std::max(total, 1.0);
  return out;
}

constexpr int kLevels = 8;

// Columns of cells, and the mean of them on its side: bins upwards, shares to the right.
void draw_strip(Picture& p, const Strip& s, const Bins& bins, const Axis& x, const Axis& y,
                double sum_left, double sum_width) {
  std::vector<std::vector<double>> columns;
  std::vector<double> sum(static_cast<size_t>(bins.count));
  double most = 1e-30;
  for (const Histogram& h : s.blocks) {
    columns.push_back(shares(h, bins));
    for (size_t k = 0; k < sum.size(); ++k) {
      most = std::max(most, columns.back()[k]);
      sum[k] += columns.back()[k];
    }
  }
  std::array<std::string, kLevels> levels;  // one path each: a page has many thousand cells
  for (size_t i = 0; i < columns.size(); ++i)
    for (size_t k = 0; k < sum.size(); ++k) {
      if (columns[i][k] <= 0) continue;
      const double level = std::ceil(kLevels * std::sqrt(columns[i][k] / most)) - 1;
      const auto at = static_cast<int64_t>(k);
      levels[static_cast<size_t>(std::clamp(level, 0.0, kLevels - 1.0))] +=
          fmt::format("M{0:.1f} {1:.1f}H{2:.1f}V{3:.1f}H{0:.1f}z", x(static_cast<double>(i) - 0.5),
                      y(bins.edge(at)), x(static_cast<double>(i) + 0.5), y(bins.edge(at + 1)));
    }
  for (int l = 0; l < kLevels; ++l)
    p.path(levels[static_cast<size_t>(l)], fmt::format("heat{}", l + 1));

  const double largest = std::max(*std::max_element(sum.begin(), sum.end()), 1e-30);
  std::string outline = fmt::format("M{:.1f} {:.1f}", sum_left, y.from);
  for (size_t k = 0; k < sum.size(); ++k)
    outline += fmt::format("H{:.1f}V{:.1f}", sum_left + sum_width * sum[k] / largest,
                           y(bins.edge(static_cast<int64_t>(k) + 1)));
  p.path(outline + fmt::format("H{:.1f}z", sum_left), "sum");
}

double mean_of(const Strip& s) {
  double sum = 0, n = 0;
  for (const Histogram& h : s.blocks)
    for (const int64_t c : h.counts) {
      sum += h.mean * static_cast<double>(c);
      n += static_cast<double>(c);
    }
  return n > 0 ? sum / n : 0;
}

std::string draw(const std::vector<Row>& rows, const std::array<Column, 2>& columns,
                 const char* what) {
  constexpr double kName = 84, kStrip = 226, kSum = 42, kHeight = 50, kGap = 17, kTop = 26;
  constexpr double kStep = (Picture::kWidth - kName) / 2;
  Picture p(kTop + static_cast<double>(rows.size()) * (kHeight + kGap), what);
  for (size_t c = 0; c < 2; ++c) {
    const Bins bins = bins_for(rows, c, columns[c].also);
    const double left = kName + kStep * static_cast<double>(c) + 34;
    p.text({left, 10}, "head start", columns[c].head);
    for (size_t r = 0; r < rows.size(); ++r) {
      const Strip& s = rows[r].strips[c];
      const double top = kTop + static_cast<double>(r) * (kHeight + kGap);
      if (c == 0) p.text({0, top + kHeight / 2 + 4}, "head start", rows[r].name);
      if (s.empty()) {
        p.text({left, top + kHeight / 2 + 4}, "tick start", columns[c].empty);
        continue;
      }
      const Axis y{
          .lo = bins.edge(0), .hi = bins.edge(bins.count), .from = top + kHeight, .to = top};
      const double width = std::min(kStrip, 56 * static_cast<double>(s.blocks.size()));
      const Axis x = svg::places(s.blocks.size(), left, left + width);
      p.frame(x, y, true, r + 1 == rows.size(), 4, 8, r + 1 == rows.size() ? "block" : "");
      draw_strip(p, s, bins, x, y, x.to + 8, kSum);
      p.text({x.to + 8 + kSum, top - 3}, "tick end",
             "mean " + svg::number(mean_of(s), columns[c].digits));
    }
  }
  return p.str();
}

const char* site_label(const std::string& name) {
  static const std::map<std::string, const char*> kNames = {{"qkv", "norm → q, k, v"},
                                                            {"out", "v → o"},
                                                            {"qkt", "q – k"},
                                                            {"fc1", "norm → gate, up"},
                                                            {"down", "up → down"}};
  const auto it = kNames.find(name);
  return it == kNames.end() ? nullptr : it->second;
}

}  // namespace

Figure clip_factors(const BlockReports& blocks) {
  std::vector<Row> rows;
  for (const std::string& kind : linear_kinds(blocks)) {
    Row row{short_name(kind), {}};
    for (const BlockReport& b : blocks) {
      const quant::LinearReport* l = find_linear(b, kind);
      row.strips[0].blocks.push_back(l ? l->gamma : Histogram{});
      row.strips[1].blocks.push_back(l ? l->beta : Histogram{});
    }
    if (!row.strips[0].empty() || !row.strips[1].empty()) rows.push_back(std::move(row));
  }
  if (rows.empty())
    return {"",
            "No clip factors: every group keeps its whole range, or the report does not hold "
            "them."};
  return {draw(rows,
               {Column{"γ, of the largest weight", "not learned", 1, 3},
                Column{"β, of the smallest weight", "not learned", 1, 3}},
               "clip factors of every linear"),
          "<b>Clip factors after learning,</b> one γ and one β for each row and group; 1 keeps the "
          "whole range, and both begin at 0.982. Each column of a strip is a block, darker where "
          "more of its factors lie (every strip on its own scale); at the right the sum over all "
          "blocks."};
}

Figure transformation_sites(const BlockReports& blocks) {
  std::vector<std::string> names;
  for (const BlockReport& b : blocks)
    for (const quant::SiteReport& s : b.sites)
      if (std::find(names.begin(), names.end(), s.name) == names.end()) names.push_back(s.name);
  if (names.empty()) return {"", "There is no transformation, or the report does not hold it."};
  std::vector<Row> rows;
  for (const std::string& name : names) {
    const char* label = site_label(name);
    Row row{label ? label : name, {}};
    for (const BlockReport& b : blocks) {
      const auto it = std::find_if(b.sites.begin(), b.sites.end(),
                                   [&](const quant::SiteReport& s) { return s.name == name; });
      row.strips[0].blocks.push_back(it == b.sites.end() ? Histogram{} : it->log2_scale);
      row.strips[1].blocks.push_back(it == b.sites.end() ? Histogram{} : it->shift);
    }
    rows.push_back(std::move(row));
  }
  return {
      draw(rows, {Column{"log₂ |s|, scales", "no scale", 0}, Column{"δ, shifts", "no shift", 0}},
           "scales and shifts of the transformation"),
      "<b>The equivalent transformation after learning,</b> a scale s and a shift δ for each "
      "channel: activations become (x − δ) / s, weights s · W. Strips as for the clip "
      "factors."};
}

}  // namespace omq
