// See report_svg.h.
#include "tools/report_svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace omq::svg {
namespace {

// At most two decimals, none that say nothing: "12", "12.5", "12.25".
std::string unit(double v) {
  std::string s = fmt::format("{:.2f}", v);
  while (s.back() == '0') s.pop_back();
  if (s.back() == '.') s.pop_back();
  return s == "-0" ? "0" : s;
}

// Largest 1, 2 or 5 times a power of ten that is not above v > 0.
double round_down(double v) {
  const double ten = std::pow(10, std::floor(std::log10(v)));
  for (const double m : {5.0, 2.0})
    if (m * ten <= v * (1 + 1e-9)) return m * ten;
  return ten;
}
double round_up(double v) {
  const double below = round_down(v);
  if (below >= v * (1 - 1e-9)) return below;
  const double ten = std::pow(10, std::floor(std::log10(below) + 1e-9));
  return below / ten < 1.5 ? 2 * ten : below / ten < 3 ? 5 * ten : 10 * ten;
}

}  // namespace

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        if ((static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') || c == 0x7f)
          out += "\xef\xbf\xbd";
        else
          out += c;
    }
  return out;
}

std::string number(double v, int digits) {
  if (!std::isfinite(v)) return "–";
  if (v == 0) return "0";
  const std::string rounded = fmt::format("{:.{}e}", v, digits - 1);  // "-1.20e-05"
  const size_t e = rounded.find('e');
  const int exponent = std::stoi(rounded.substr(e + 1));
  const char* sign = v < 0 ? "−" : "";
  if (exponent >= -4 && exponent < 6)
    return fmt::format("{}{:.{}f}", sign, std::abs(v), std::max(0, digits - 1 - exponent));
  static constexpr const char* kRaised[] = {"⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹"};
  std::string out = sign + rounded.substr(v < 0 ? 1 : 0, e - (v < 0 ? 1 : 0)) + "·10";
  if (exponent < 0) out += "⁻";
  for (const char c : std::to_string(std::abs(exponent))) out += kRaised[c - '0'];
  return out;
}

std::string tick_label(double v) {
  if (v == 0) return "0";
  const double size = std::abs(v);
  int digits = 1;
  while (digits < 4 && std::abs(std::stod(fmt::format("{:.{}e}", v, digits - 1)) - v) > 1e-9 * size)
    ++digits;
  const std::string s = number(v, digits);
  return s.starts_with("1·") ? s.substr(std::string_view("1·").size()) : s;
}

double Axis::operator()(double v) const {
  if (!(v > lo)) v = lo;  // also when it is no number
  if (v > hi) v = hi;
  const double share = log ? std::log(v / lo) / std::log(hi / lo) : (v - lo) / (hi - lo);
  return from + (to - from) * share;
}

std::vector<double> Axis::ticks(int wanted) const {
  std::vector<double> out;
  if (log) {
    // 1, 2, 5 of every power of ten, or 1 alone, or 1 of every second, …
    const double decades = std::log10(hi / lo);
    if (decades * 3 <= wanted * 1.5 + 1) {
      for (double v = round_down(lo); v <= hi * (1 + 1e-9); v = round_up(v * 1.01))
        if (v >= lo * (1 - 1e-9)) out.push_back(v);
      return out;
    }
    const double step = std::max(1.0, std::ceil(decades / wanted));
    for (double e = std::ceil(std::log10(lo) - 1e-9); e <= std::log10(hi) + 1e-9; e += step)
      out.push_back(std::pow(10, e));
    return out;
  }
  const double step = spacing > 0 ? spacing : round_up((hi - lo) / std::max(1, wanted));
  for (double k = std::ceil(lo / step - 1e-9); k * step <= hi + 1e-9 * step; ++k)
    out.push_back(k * step == 0 ? 0 : k * step);
  return out;
}

Axis fit(std::span<const double> values, double from, double to, double ratio) {
  double lo = 0, hi = 0;
  for (const double v : values) {
    if (!(v > 1e-300 && v < 1e300)) continue;
    lo = lo == 0 ? v : std::min(lo, v);
    hi = std::max(hi, v);
  }
  if (hi == 0) return {.lo = 0, .hi = 1, .from = from, .to = to};
  if (hi <= ratio * lo) {
    const double step = round_up(hi / 4);
    return {
        .lo = 0, .hi = step * std::ceil(hi / step - 1e-9), .from = from, .to = to, .spacing = step};
  }
  const auto decade = [](double v, auto towards) { return std::pow(10, towards(std::log10(v))); };
  if (hi > 300 * lo) {  // ticks are powers of ten: end on them
    lo = decade(lo, [](double e) { return std::floor(e + 1e-9); });
    hi = decade(hi, [](double e) { return std::ceil(e - 1e-9); });
  }
  return {.lo = round_down(lo), .hi = round_up(hi), .from = from, .to = to, .log = true};
}

Axis around(std::span<const double> values, double also, double from, double to, int steps) {
  double lo = also, hi = also;
  for (const double v : values)
    if (std::abs(v) < 1e300) {
      lo = std::min(lo, v);
      hi = std::max(hi, v);
    }
  const double step = round_up(std::max((hi - lo) / steps, 1e-3 * std::max(1.0, std::abs(also))));
  const double below = step * std::floor(lo / step + 1e-9);
  return {.lo = below,
          .hi = std::max(step * std::ceil(hi / step - 1e-9), below + step),
          .from = from,
          .to = to,
          .spacing = step};
}

Axis places(size_t n, double from, double to) {
  return {
      .lo = -0.5, .hi = static_cast<double>(std::max<size_t>(n, 1)) - 0.5, .from = from, .to = to};
}

Picture::Picture(double height, std::string_view what, double width)
    : out_(fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\"><title>{}</title>\n", unit(width),
                       unit(height), escaped(what))) {}

void Picture::shape(std::string open, std::string_view style, std::string_view note) {
  out_ += open + fmt::format(" class=\"{}\"", style);
  out_ += note.empty() ? "/>\n" : fmt::format("><title>{}</title>", escaped(note));
  if (!note.empty()) out_ += fmt::format("</{}>\n", open.substr(1, open.find(' ') - 1));
}

void Picture::line(Point a, Point b, std::string_view style) {
  shape(fmt::format("<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\"", unit(a.x), unit(a.y),
                    unit(b.x), unit(b.y)),
        style, {});
}

void Picture::curve(std::span<const Point> points, std::string_view style) {
  std::string list;
  for (const Point& p : points)
    list += fmt::format("{}{},{}", list.empty() ? "" : " ", unit(p.x), unit(p.y));
  shape(fmt::format("<polyline points=\"{}\"", list), style, {});
}

void Picture::dot(Point at, double radius, std::string_view style, std::string_view note) {
  shape(fmt::format("<circle cx=\"{}\" cy=\"{}\" r=\"{}\"", unit(at.x), unit(at.y), unit(radius)),
        style, note);
}

void Picture::box(Point corner, double width, double height, std::string_view style,
                  std::string_view note) {
  shape(fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"", unit(corner.x),
                    unit(corner.y), unit(width), unit(height)),
        style, note);
}

void Picture::path(const std::string& data, std::string_view style) {
  if (!data.empty()) shape(fmt::format("<path d=\"{}\"", data), style, {});
}

void Picture::text(Point at, std::string_view style, std::string_view text) {
  out_ += fmt::format("<text x=\"{}\" y=\"{}\" class=\"{}\">{}</text>\n", unit(at.x), unit(at.y),
                      style, escaped(text));
}

void Picture::frame(const Axis& x, const Axis& y, bool y_labels, bool x_labels, int y_ticks,
                    int x_ticks, std::string_view x_name) {
  for (const double v : y.ticks(y_ticks)) {
    line({x.from, y(v)}, {x.to, y(v)}, "grid");
    if (y_labels) text({x.from - 5, y(v) + 3.3}, "tick end", tick_label(v));
  }
  line({x.from, y.from}, {x.to, y.from}, "axis");
  for (const double v : x.ticks(x_ticks)) {
    if (v != std::floor(v)) continue;
    line({x(v), y.from}, {x(v), y.from + 3}, "axis");
    if (x_labels) text({x(v), y.from + 13}, "tick middle", fmt::format("{:.0f}", v));
  }
  if (!x_name.empty()) text({x.from - 5, y.from + 13}, "tick end", x_name);
}

std::string Picture::str() const { return out_ + "</svg>\n"; }

}  // namespace omq::svg
