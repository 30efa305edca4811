// See report_figures.h.
#include "tools/report_figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "tools/cli.h"
#include "tools/report_svg.h"

namespace omq {

using quant::BlockReport;
using quant::LinearReport;
using svg::Axis;
using svg::Picture;
using svg::Point;

namespace {

constexpr double kLeft = 52, kRight = Picture::kWidth - 6;

bool learned(const BlockReport& b) { return !b.epoch_loss.empty(); }

double relative_loss(const BlockReport& b) {
  return b.target_mean_square > 0 ? b.committed_loss / b.target_mean_square : 0;
}

double last_share(const BlockReport& b) {
  return learned(b) && b.epoch_loss.front() > 0 ? b.epoch_loss.back() / b.epoch_loss.front() : 0;
}

// Rows and columns of equal panels below `top`; the labels of y have their room left of the first.
struct Grid {
  size_t columns;
  double top, panel, gap_x, gap_y;  // panel: height
  double width() const {
    return (kRight - kLeft - gap_x * static_cast<double>(columns - 1)) /
           static_cast<double>(columns);
  }
  double left(size_t i) const {
    return kLeft + static_cast<double>(i % columns) * (width() + gap_x);
  }
  double upper(size_t i) const { return top + static_cast<double>(i / columns) * (panel + gap_y); }
  double bottom(size_t n) const { return upper(std::max<size_t>(n, 1) - 1) + panel; }
};

// Loss of the first and the last epoch, one block a place.
void draw_learning(Picture& p, const BlockReports& blocks, const Axis& x, const Axis& y) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    const BlockReport& b = blocks[i];
    if (!learned(b)) continue;
    const double at = x(static_cast<double>(i)), a = b.epoch_loss.front(), z = b.epoch_loss.back();
    const std::string note = fmt::format("{}: {} → {}", b.name, svg::number(a), svg::number(z));
    p.line({at, y(a)}, {at, y(z)}, "span");
    p.dot({at, y(a)}, 2.6, "before", note);
    p.dot({at, y(z)}, 2.6, "after", note);
  }
}

// A value above 0 a block, on a stem from `root`.
void draw_stems(Picture& p, const BlockReports& blocks, const Axis& x, const Axis& y, double root,
                double (*value)(const BlockReport&)) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    const double v = value(blocks[i]), at = x(static_cast<double>(i));
    if (!(v > 0)) continue;
    p.line({at, y(root)}, {at, y(v)}, "span");
    p.dot({at, y(v)}, 2.6, "after", fmt::format("{}: {}", blocks[i].name, svg::number(v)));
  }
}

void draw_legend(Picture& p, double x, double y, const char* before, const char* after) {
  p.dot({x, y - 3.5}, 2.6, "before");
  p.text({x + 7, y}, "label start", before);
  x += 20 + 5.4 * static_cast<double>(std::string_view(before).size());
  p.dot({x, y - 3.5}, 2.6, "after");
  p.text({x + 7, y}, "label start", after);
}

}  // namespace

std::vector<std::string> linear_kinds(const BlockReports& blocks) {
  std::vector<std::string> kinds;
  for (const BlockReport& b : blocks)
    for (const LinearReport& l : b.linears)
      if (std::find(kinds.begin(), kinds.end(), l.name) == kinds.end()) kinds.push_back(l.name);
  return kinds;
}

const LinearReport* find_linear(const BlockReport& b, const std::string& name) {
  const auto it = std::find_if(b.linears.begin(), b.linears.end(),
                               [&](const LinearReport& l) { return l.name == name; });
  return it == b.linears.end() ? nullptr : &*it;
}

bool beyond_nearest(const BlockReports& blocks) {
  for (const BlockReport& b : blocks)
    for (const LinearReport& l : b.linears)
      if (l.error != l.error_nearest) return true;
  return false;
}

std::string short_name(const std::string& name) { return name.substr(name.rfind('.') + 1); }

Figure loss_by_depth(const BlockReports& blocks) {
  std::vector<double> losses, shares, relative;
  for (const BlockReport& b : blocks) {
    if (learned(b)) losses.insert(losses.end(), {b.epoch_loss.front(), b.epoch_loss.back()});
    if (learned(b)) shares.push_back(last_share(b));
    if (relative_loss(b) > 0) relative.push_back(relative_loss(b));
  }
  if (relative.empty())
    return {"", "No text went through the blocks, so there is no loss to show."};
  constexpr double kPanel = 128, kLow = 74, kGap = 34;
  double top = 24;
  Picture p(losses.empty() ? top + kLow + 16 : top + kPanel + 2 * (kGap + kLow) + 16,
            "loss of every block");
  const Axis x = svg::places(blocks.size(), kLeft, kRight);
  std::string caption = "<b>Loss across depth.</b> ";
  if (!losses.empty()) {
    const Axis y = svg::fit(losses, top + kPanel, top);
    p.text({kLeft, top - 12}, "head start", "objective, mean over an epoch");
    draw_legend(p, kRight - 132, top - 12, "first epoch", "last epoch");
    p.frame(x, y, true, false, 4, 10);
    draw_learning(p, blocks, x, y);
    top += kPanel + kGap;
    const Axis share = svg::around(shares, 1, top + kLow, top);
    p.text({kLeft, top - 12}, "head start", "last epoch / first epoch");
    p.frame(x, share, true, false, 3, 10);
    draw_stems(p, blocks, x, share, 1, last_share);
    top += kLow + kGap;
    caption +=
        "Above: the objective in the first and in the last epoch of each block, and what was left "
        "of it. Below: ";
  }
  const Axis y = svg::fit(relative, top + kLow, top);
  p.text({kLeft, top - 12}, "head start", "committed block: squared error / mean square of target");
  p.frame(x, y, true, true, 3, 10, "block");
  draw_stems(p, blocks, x, y, 0, relative_loss);
  caption +=
      "‖F<sub>q</sub>(X<sub>q</sub>) − F(X)‖² / ‖F(X)‖² of the packed block F<sub>q</sub>; F and X "
      "are in full precision, X<sub>q</sub> comes out of the packed blocks before, so that it "
      "holds the errors of all of them.";
  return {p.str(), caption};
}

Figure loss_by_epoch(const BlockReports& blocks) {
  std::vector<double> ratios;
  size_t epochs = 0;
  for (const BlockReport& b : blocks)
    for (const double v : b.epoch_loss)
      if (b.epoch_loss.front() > 0) {
        ratios.push_back(v / b.epoch_loss.front());
        epochs = std::max(epochs, b.epoch_loss.size());
      }
  if (ratios.empty()) return {};
  const size_t n = blocks.size();
  const Grid grid{n <= 4    ? n
                  : n <= 12 ? 4u
                  : n <= 36 ? 6u
                  : n <= 64 ? 8u
                            : 10u,
                  6, n <= 12 ? 70.0 : 50.0, 10, 16};
  Picture p(grid.bottom(n) + 16, "loss of every block over the epochs");
  const auto [least, most] = std::minmax_element(ratios.begin(), ratios.end());
  const bool wide = *most > 10 * *least;
  bool recovered = false;
  for (size_t i = 0; i < n; ++i) {
    const BlockReport& b = blocks[i];
    const double top = grid.upper(i), base = top + grid.panel;
    const Axis y = wide ? svg::fit(ratios, base, top) : svg::around(ratios, 1, base, top);
    const Axis x{.lo = 1,
                 .hi = std::max(2.0, static_cast<double>(epochs)),
                 .from = grid.left(i) + 2,
                 .to = grid.left(i) + grid.width() - 2};
    const bool lowest = i + grid.columns >= n;
    p.frame(x, y, i % grid.columns == 0, false, 3, 3,
            i + grid.columns >= n && i % grid.columns == 0 ? "epoch" : "");
    if (lowest) {
      p.text({x.from, base + 13}, "tick start", "1");
      p.text({x.to, base + 13}, "tick end", std::to_string(epochs));
    }
    p.text({x.from + 3, base - 5}, "label start", std::to_string(i));
    if (!learned(b) || !(b.epoch_loss.front() > 0)) continue;
    std::vector<Point> points;
    for (size_t e = 0; e < b.epoch_loss.size(); ++e)
      points.push_back({x(static_cast<double>(e + 1)), y(b.epoch_loss[e] / b.epoch_loss.front())});
    p.curve(points, "curve");
    p.dot(points.back(), 2, "after",
          fmt::format("{}: {} → {}", b.name, svg::number(b.epoch_loss.front()),
                      svg::number(b.epoch_loss.back())));
    for (const quant::Recovery& r : b.recoveries)
      p.line({x(r.epoch), base}, {x(r.epoch), top}, "alarm");
    recovered = recovered || !b.recoveries.empty();
  }
  std::string caption =
      "<b>Loss over the epochs,</b> a panel for each block, as a share of its first epoch. All "
      "panels have the same axes.";
  if (recovered) caption += " A red line marks an epoch that was begun again at a lower rate.";
  return {p.str(), caption};
}

Figure linear_errors(const BlockReports& blocks) {
  const std::vector<std::string> kinds = linear_kinds(blocks);
  std::vector<double> errors, ratios;
  const bool differ = beyond_nearest(blocks);
  bool outputs = false;
  for (const BlockReport& b : blocks)
    for (const LinearReport& l : b.linears) {
      errors.insert(errors.end(), {l.error_nearest, l.error});
      if (l.error_nearest > 0) ratios.push_back(l.error / l.error_nearest);
      outputs = outputs || b.output_errors;
    }
  if (errors.empty()) return {"", "The report does not hold errors of linears."};
  constexpr double kRatio = 34, kBetween = 15;
  const double low = differ ? kRatio + kBetween : 0;
  const Grid grid{std::min<size_t>(4, kinds.size()), differ ? 38.0 : 18.0, 78 + low, 12, 40};
  Picture p(grid.bottom(kinds.size()) + 16, "error of every linear");
  if (differ) draw_legend(p, kLeft + 3, 10, "round to nearest", "committed");
  for (size_t k = 0; k < kinds.size(); ++k) {
    const double top = grid.upper(k), left = grid.left(k), bottom = top + grid.panel;
    const bool first = k % grid.columns == 0;
    const Axis x = svg::places(blocks.size(), left, left + grid.width());
    const Axis y = svg::fit(errors, bottom - low, top);
    const Axis ratio = svg::around(ratios, 1, bottom, bottom - kRatio, 2);
    p.text({left, top - 8}, "head start", short_name(kinds[k]));
    p.frame(x, y, first, !differ, 4, 4, first && !differ ? "block" : "");
    if (differ) p.frame(x, ratio, first, true, 2, 4, first ? "block" : "");
    std::vector<Point> before, after, shares;
    for (size_t i = 0; i < blocks.size(); ++i)
      if (const LinearReport* l = find_linear(blocks[i], kinds[k])) {
        const double at = x(static_cast<double>(i));
        before.push_back({at, y(l->error_nearest)});
        after.push_back({at, y(l->error)});
        if (l->error_nearest > 0) shares.push_back({at, ratio(l->error / l->error_nearest)});
      }
    const double radius = blocks.size() > 40 ? 1.3 : 1.9;
    if (differ) {
      p.curve(before, "faint curve");
      for (const Point& at : before) p.dot(at, radius, "before");
      p.line({x.from, ratio(1)}, {x.to, ratio(1)}, "axis");
      p.curve(shares, "curve");
    }
    p.curve(after, "curve");
    for (const Point& at : after) p.dot(at, radius, "after");
  }
  std::string caption = outputs ? "<b>Error of every matrix,</b> ‖Ŷ − Y‖ / ‖Y‖ of its outputs on a "
                                  "calibration window: Y in full precision, Ŷ with the low-bit "
                                  "weights (and activations, where they are quantised), everything "
                                  "around it in full precision. "
                                : "<b>Error of every matrix,</b> ‖Ŵ − W‖ / ‖W‖ of its weights, "
                                  "since no text was given. ";
  caption += differ
                 ? "Hollow: the untouched matrix rounded to nearest. Filled: what was committed. "
                   "Below each: the second as a share of the first."
                 : "This method rounds to nearest.";
  return {p.str(), caption};
}

Figure cost_by_depth(const BlockReports& blocks) {
  std::vector<double> seconds, bytes;
  for (const BlockReport& b : blocks) {
    seconds.push_back(b.seconds);
    bytes.push_back(static_cast<double>(b.peak_bytes) / (1 << 20));
  }
  if (blocks.empty()) return {"", "The report does not hold the cost of blocks."};
  const Grid grid{2, 22, 84, 40, 26};
  Picture p(grid.bottom(2) + 16, "time and memory of every block");
  const auto bars = [&](size_t k, const std::vector<double>& values, const char* head,
                        const auto& label) {
    const Axis x = svg::places(blocks.size(), grid.left(k), grid.left(k) + grid.width());
    const Axis y = svg::fit(values, grid.upper(k) + grid.panel, grid.upper(k), 1e300);
    p.text({x.from, 12}, "head start", head);
    p.frame(x, y, true, true, 3, 8, "block");
    const double width = std::min(14.0, 0.7 * (x.to - x.from) / static_cast<double>(values.size()));
    for (size_t i = 0; i < values.size(); ++i)
      p.box({x(static_cast<double>(i)) - width / 2, y(values[i])}, width, y.from - y(values[i]),
            "bar", fmt::format("{}: {}", blocks[i].name, label(values[i])));
  };
  bars(0, seconds, "seconds", [](double v) { return cli::human_seconds(v); });
  bars(1, bytes, "MiB of tensors at most",
       [](double v) { return cli::human_bytes(v * (1 << 20)); });
  return {p.str(),
          "<b>Cost of every block:</b> time, and the most memory that tensors took "
          "while it was calibrated."};
}

}  // namespace omq
