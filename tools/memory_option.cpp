// See memory_option.h.
#include "tools/memory_option.h"

#include <cmath>

#include "tools/cli.h"

namespace omq::cli {

size_t parse_memory(std::string_view text) {
  const Decimal number = decimal_at(text).value_or(Decimal{0, 0});
  std::string_view unit = text.substr(number.length);
  double factor = 1;
  if (!unit.empty()) {
    const size_t power = std::string_view("KMG").find(static_cast<char>(unit[0] & ~0x20));
    if (power == std::string_view::npos)
      factor = 0;
    else
      factor = std::exp2(10.0 * static_cast<double>(power + 1));
    unit.remove_prefix(1);
    if (unit != "" && unit != "B" && unit != "iB") factor = 0;
  }
  const double bytes = number.value * factor;
  if (!(bytes >= 1) || bytes > 1e18)
    throw UsageError(fmt::format("--memory-limit {}: a size such as 24G or 512M wanted", text));
  return static_cast<size_t>(bytes);
}

quant::PlanShapes plan_shapes(const ModelConfig& c, int64_t windows, int64_t tokens) {
  const int64_t d = c.hidden_size, f = c.intermediate_size, q = c.q_size(), kv = c.kv_size();
  return {.linears = {{q, d}, {kv, d}, {kv, d}, {d, q}, {f, d}, {f, d}, {d, f}},
          .hidden = d,
          .windows = windows,
          .tokens = tokens};
}

std::string plan_text(const quant::MemoryPlan& p, Device device, size_t limit) {
  const auto size = [](size_t bytes) { return human_bytes(static_cast<double>(bytes)); };
  std::string text = fmt::format("a block about {} on {}", size(p.block), to_string(device));
  if (p.samples > 0)
    text += fmt::format(", samples {} {}", size(p.samples),
                        p.samples_on_host ? "in host memory" : "beside it");
  return limit > 0 ? text + fmt::format(" (limit {})", size(limit)) : text;
}

}  // namespace omq::cli
