// A trace as a page of 100 columns: for each step its equation, its numbers, and where the code and
// its test are. Only a path may be longer, on a line that holds nothing else.
#include <bit>
#include <cmath>

#include "tools/trace.h"

namespace omq {
namespace {

using nlohmann::json;

constexpr size_t kWidth = 100;

// Characters, not bytes.
size_t width(std::string_view text) {
  size_t n = 0;
  for (const char c : text) n += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  return n;
}

// `right` ends in the last column.
std::string both_ends(const std::string& left, const std::string& right) {
  const size_t used = width(left) + width(right);
  return left + std::string(used + 2 < kWidth ? kWidth - used : 2, ' ') + right;
}

template <class... T> void line(fmt::format_string<T...> text, T&&... values) {
  std::string all = fmt::format(text, std::forward<T>(values)...);
  all.resize(all.find_last_not_of(' ') + 1);
  fmt::print("   {}\n", all);
}

double number(const json& j) { return j.get<double>(); }

// "8f77a012" → "8f 77 a0 12"
std::string spaced(const std::string& hex) {
  std::string text;
  for (size_t i = 0; i < hex.size(); i += 2) text += (i ? " " : "") + hex.substr(i, 2);
  return text;
}

std::string binary(int code, int bits) { return fmt::format("{:0{}b}", code, bits); }

// What a page shows of a group.
struct Shown {
  size_t first, count, all;  // columns
  std::string rest() const {
    return count < all ? fmt::format("… {} more: --show 0, or --json", all - count) : "";
  }
};

void numbers(const json& values, const Shown& s) {
  for (size_t i = 0; i < s.count; i += 8) {
    std::string text = fmt::format("{:6}…", s.first + i);
    for (size_t k = i; k < std::min(s.count, i + 8); ++k)
      text += fmt::format("{:+11.6f}", number(values[k]));
    line("{}", text);
  }
  if (s.count < s.all) line("{:>7} {}", "", s.rest());
}

// ---- the steps ----

void weights(const json& j, const Shown& s) {
  line("from {}", j["from"].get<std::string>());
  line("The number in front of a line is the column of its first weight.");
  numbers(j["w"], s);
}

void range(const json& j, const Shown&) {
  const json &hi = j["largest"], &lo = j["smallest"];
  line("max w = {:+.8f} (column {})   min w = {:+.8f} (column {})", number(j["max"]),
       hi["column"].get<int64_t>(), number(j["min"]), lo["column"].get<int64_t>());
  if (number(hi["w"]) < 0 || number(lo["w"]) > 0)
    line(
        "All weights are on one side of 0; the range is widened to hold it, so that 0 has a code.");
}

void clipping(const json& j, const Shown&) {
  if (j.contains("u")) {
    line("u = {:g}, l = {:g}: where calibration starts. It moves both until the block's output is",
         number(j["u"]), number(j["l"]));
    line("closest to the full-precision one (Eq. 1); nothing is calibrated here.");
  } else {
    line("Round to nearest takes the range as it is.");
  }
  line("γ = {:.8f}   γ·max w = {:+.8f}", number(j["gamma"]), number(j["hi"]));
  line("β = {:.8f}   β·min w = {:+.8f}", number(j["beta"]), number(j["lo"]));
}

void clipped(const json& j, const Shown&) {
  line("γ and β are not stored, h is: its codes span {:.8f} of a range of {:.8f}, {:.1f} %.",
       number(j["span"]), number(j["range"]), 100 * number(j["span"]) / number(j["range"]));
}

void grid(const json& j, const Shown&) {
  const int bits = j["bits"].get<int>();
  const double hi = number(j["hi"]), lo = number(j["lo"]), h = number(j["h"]);
  if (j["symmetric"].get<bool>()) {
    line("h = {:.8f} / {} = {:.9f}", std::max(hi, -lo), (1 << (bits - 1)) - 0.5, h);
    line("z = {}, in every group", number(j["z"]));
    return;
  }
  line("h = ({:.8f} − ({:.8f})) / {} = {:.9f}", hi, lo, (1 << bits) - 1, h);
  if (hi - lo < 0.99 * h * ((1 << bits) - 1)) line("That would be less than the smallest scale.");
  line("z = ⌊{:.8f} / {:.9f}⌉ = ⌊{:.4f}⌉ = {}     ⌊·⌉ rounds half to even", -lo, h, -lo / h,
       number(j["z"]));
}

void scale(const json& j, const Shown&) {
  const std::string f16 = j["f16"].get<std::string>();
  const int bits = std::stoi(f16, nullptr, 16);
  if (j.contains("before"))
    line("h = {:.9f} → {:.9f}, off by {:.1e} of it{}", number(j["before"]), number(j["h"]),
         std::abs(number(j["h"]) / number(j["before"]) - 1),
         number(j["h"]) >= 0x1p-14 ? " (2⁻¹¹ = 4.9e-04 at most)"
                                   : " (so small a float16 is coarse)");
  line("h = {:.9f} = 0x{}: sign {}, exponent {:05b}, fraction {:010b}", number(j["h"]), f16,
       bits >> 15, bits >> 10 & 31, bits & 1023);
  line("z = {}: a whole number, so it needs no rounding", number(j["z"]));
  line("From here on h is this number: what is simulated is what is stored, bit for bit.");
}

void codes(const json& j, const json* w, const Shown& s) {
  const double h = number(j["h"]), z = number(j["z"]);
  const int bits = j["bits"].get<int>();
  line("{:>6} {:>12} {:>10} {:>7} {:>5} {:>9} {:>12} {:>12}", "column", w ? "w" : "",
       w ? "w/h" : "", "q − z", "q", "in bits", "ŵ", w ? "ŵ − w" : "");
  double worst = 0, square = 0;
  size_t clamped = 0;
  for (size_t i = 0; i < s.all; ++i) {
    const int q = j["q"][i].get<int>();
    const double got = number(j["dequantised"][i]);
    const std::string code =
        fmt::format("{:>7} {:>5} {:>9} {:>+12.6f}", q - z, q, binary(q, bits), got);
    if (!w) {
      if (i < s.count) line("{:>6} {:>12} {:>10} {}", s.first + i, "", "", code);
      continue;
    }
    const double want = number((*w)[i]), error = got - want;
    const bool outside = std::abs(want / h - (q - z)) > 0.5001;
    clamped += outside;
    worst = std::max(worst, std::abs(error));
    square += error * error;
    if (i < s.count)
      line("{:>6} {:>+12.6f} {:>+10.4f} {} {:>+12.6f}{}", s.first + i, want, want / h, code, error,
           outside ? "  clamped" : "");
  }
  if (s.count < s.all) line("{:>6} {}", "", s.rest());
  if (w)
    line("All {}: |ŵ − w| {:.6f} at most, {:.6f} rms; half a step is {:.6f}; {} clamped.", s.all,
         worst, std::sqrt(square / static_cast<double>(s.all)), h / 2, clamped);
}

void place(const json& j, const Shown&) {
  const auto i = [&j](const char* key) { return j[key].get<int64_t>(); };
  const bool zero = j.contains("zero_at");
  line(
      "row {} of panel {}, which begins at byte {} of the matrix; the group's block at byte {} of "
      "it",
      i("row_in_panel"), i("panel"), i("panel_at"), i("block_at"));
  line("a block: {} bytes, codes of 16 rows × {} columns{} in {} bits, then 16 scales{}",
       i("block_bytes"), i("padded_columns"),
       i("columns") == i("padded_columns") ? "" : fmt::format(" ({} in use)", i("columns")),
       i("stored_bits"), zero ? " and 16 zero points" : "");
  line("this row's scale at byte {} of the block{}", i("scale_at"),
       zero ? fmt::format(", its zero point at byte {}", i("zero_at")) : "; no zero points");
  if (!j.contains("file")) return;
  line("{}", j["file"].get<std::string>());
  line("there the matrix begins at byte {}, this block at byte {}", i("tensor_at"), i("file_at"));
}

// The bits of the shown codes, then all bytes of this row.
void bytes(const json& j, const json& place, const json& q, const Shown& s) {
  const bool in_file = place.contains("file_at");
  const int64_t base = in_file ? place["file_at"].get<int64_t>() : 0;
  line("{:>6} {:>5} {:>9}   bits in the block, byte:bit, highest first", "column", "q", "in bits");
  for (size_t i = 0; i < s.count; ++i) {
    std::string text;
    for (size_t k = j["bits"][i].size(); k-- > 0;)
      text += fmt::format(" {:>4}:{}", j["bits"][i][k][0].get<int64_t>(),
                          j["bits"][i][k][1].get<int>());
    const int code = q[i].get<int>();
    line("{:>6} {:>5} {:>9}  {}", s.first + i, code,
         binary(code, static_cast<int>(j["bits"][i].size())), text);
  }
  if (s.count < s.all) line("{:>6} {}", "", s.rest());
  if (j["bits"][0].size() == 3)
    line(
        "Three bytes hold eight codes: two in each, and two whose third bits are the last byte's.");
  fmt::print("\n");
  line("{:>8} {:>12}   {}", "block", in_file ? "file" : "", "bytes of this row, hexadecimal");
  const auto run = [&](int64_t at, const std::string& hex, const std::string& what) {
    line("{:>8} {:>12}   {}", at, in_file ? std::to_string(base + at) : "",
         what.empty() ? spaced(hex) : fmt::format("{:<12}{}", spaced(hex), what));
  };
  const size_t runs = j["codes"].size(), most = s.count < s.all ? 32 : runs;
  for (size_t i = 0; i < std::min(runs, most); ++i)
    run(j["codes"][i]["at"].get<int64_t>(), j["codes"][i]["hex"].get<std::string>(), "");
  if (runs > most) line("{:>21}   … {} more: --show 0, or --json", "", runs - most);
  run(place["scale_at"].get<int64_t>(), j["scale"].get<std::string>(),
      "h, float16, low byte first");
  if (j.contains("zero")) run(place["zero_at"].get<int64_t>(), j["zero"].get<std::string>(), "z");
}

void back(const json& j, const Shown& s) {
  for (size_t i = 0; i < s.count; i += 16) {
    std::string text;
    for (size_t k = i; k < std::min(s.count, i + 16); ++k)
      text += fmt::format(" {:>3}", j["q"][k].get<int>());
    line("{:>3}{}", i == 0 ? "q =" : "", text);
  }
  if (s.count < s.all) line("{:>6} {}", "", s.rest());
  line("h = {:.9f}   z = {}", number(j["h"]), number(j["z"]));
  for (const json& p : j["proofs"])
    line("{}  {}", p["holds"].get<bool>() ? "✓" : "✗ FAILED:", p["what"].get<std::string>());
}

const json* find(const json& steps, const char* name) {
  for (const json& s : steps)
    if (s["step"] == name) return &s;
  return nullptr;
}

void title(const json& t) {
  fmt::print("{}\n", both_ends(t["module"].get<std::string>(),
                               fmt::format("row {} of {}, group {} of {}: columns {} to {}",
                                           t["row"].get<int64_t>(), t["shape"][0].get<int64_t>(),
                                           t["group"].get<int64_t>(), t["groups"].get<int64_t>(),
                                           t["columns"][0].get<int64_t>(),
                                           t["columns"][1].get<int64_t>() - 1)));
  const auto size = t["group_size"].get<int64_t>();
  fmt::print("{}, {} bits{}{}\n", t["method"].get<std::string>(), t["bits"].get<int>(),
             size > 0 ? fmt::format(" in groups of {}", size) : ", a group a row",
             t["symmetric"].get<bool>() ? ", symmetric" : "");
  fmt::print("{}\n",
             t["packed"].is_null() ? "quantised here; nothing is calibrated and nothing is written"
             : t["model"].is_null()
                 ? "read from the packed file; the weights that it was made from are not here"
                 : "w from the checkpoint, codes and grid from the packed file");
  if (t.contains("transformed") && t["transformed"].get<bool>())
    fmt::print(
        "Scales or shifts were folded into this block (Eq. 3, 5), as its norms or biases tell, or\n"
        "its method moves weights or solves for codes. So w below is not what was rounded to\n"
        "nearest, and codes are shown without it.\n");
}

}  // namespace

void print_trace(const json& t, int64_t show) {
  title(t);
  const json& steps = t["steps"];
  const json *w = find(steps, "weights"), *q = find(steps, "codes"), *where = find(steps, "place");
  const bool folded = t.contains("transformed") && t["transformed"].get<bool>();
  const size_t all = (*q)["q"].size();
  const Shown shown{t["columns"][0].get<size_t>(),
                    show > 0 ? std::min(all, static_cast<size_t>(show)) : all, all};
  int number_of = 0;
  for (const json& s : steps) {
    const std::string name = s["step"].get<std::string>();
    fmt::print("\n{}\n",
               both_ends(fmt::format("{:<2} {}", ++number_of, s["title"].get<std::string>()),
                         s["equation"].get<std::string>()));
    if (name == "weights") weights(s, shown);
    if (name == "range") range(s, shown);
    if (name == "clipping") clipping(s, shown);
    if (name == "clipped") clipped(s, shown);
    if (name == "grid") grid(s, shown);
    if (name == "scale") scale(s, shown);
    if (name == "codes") codes(s, w && !folded ? &(*w)["w"] : nullptr, shown);
    if (name == "place") place(s, shown);
    if (name == "bytes") bytes(s, *where, (*q)["q"], shown);
    if (name == "back") back(s, shown);
    fmt::print(
        "{}\n",
        both_ends("", fmt::format("{} in {}, held by {}", s["function"].get<std::string>(),
                                  s["source"].get<std::string>(), s["test"].get<std::string>())));
  }
}

}  // namespace omq
