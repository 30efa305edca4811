// Drawing for the pages of reports: axes, and a picture as inline SVG.
//
// A picture is 720 units wide, the width of the text. Colours, strokes and letters are classes of
// the page's style sheet (report_style.h), so that light, dark and print differ in one place only.
// Every number that is written is finite: axes clamp.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace omq::svg {

// For text between tags and in attributes: & < > " ' as entities, control characters as U+FFFD.
std::string escaped(std::string_view text);
// "0.0123", "1.23·10⁻⁵", "128"; "–" for what is no number.
std::string number(double v, int digits = 3);
// As short as it can be: "0.05", "10⁻⁵".
std::string tick_label(double v);

// From data to units of the picture.
struct Axis {
  double lo = 0, hi = 1;    // data, lo < hi; 0 < lo when log
  double from = 0, to = 1;  // units
  bool log = false;
  double spacing = 0;  // of ticks; 0: as wanted

  double operator()(double v) const;  // v outside is put on the edge, so is what is no number
  // About `wanted` round values.
  std::vector<double> ticks(int wanted) const;
};
// An axis for all positive `values`: from 0, or logarithmic when they span more than `ratio` times.
Axis fit(std::span<const double> values, double from, double to, double ratio = 10);
// An axis that just holds all `values` and `also`, in about `steps` round steps.
Axis around(std::span<const double> values, double also, double from, double to, int steps = 3);
// An axis for whole numbers 0…n−1, each in the middle of its share.
Axis places(size_t n, double from, double to);

struct Point {
  double x = 0, y = 0;
};

class Picture {
 public:
  static constexpr double kWidth = 720;

  // what: for those who cannot see it.
  Picture(double height, std::string_view what, double width = kWidth);

  void line(Point a, Point b, std::string_view style);
  void curve(std::span<const Point> points, std::string_view style);
  // note: shown when pointed at.
  void dot(Point at, double radius, std::string_view style, std::string_view note = {});
  void box(Point corner, double width, double height, std::string_view style,
           std::string_view note = {});
  // Path data as it stands.
  void path(const std::string& data, std::string_view style);
  // style: of the text, with start, middle or end.
  void text(Point at, std::string_view style, std::string_view text);

  // Ticks of y as lines over x's width, with labels unless the panel to the left has them; x's base
  // line with ticks at the places of whole numbers, and what they count when there is room for it.
  void frame(const Axis& x, const Axis& y, bool y_labels, bool x_labels, int y_ticks = 4,
             int x_ticks = 6, std::string_view x_name = {});
  std::string str() const;

 private:
  void shape(std::string open, std::string_view style, std::string_view note);
  std::string out_;
};

}  // namespace omq::svg
