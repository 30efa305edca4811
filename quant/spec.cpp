// QuantSpec: parsing and printing.
#include "quant/spec.h"

#include <charconv>
#include <tuple>

namespace omq::quant {
namespace {

// Reads "<letter><digits>" off the front of text; false when it is not there.
bool take(std::string_view& text, char letter, int64_t& value) {
  if (text.empty() || text[0] != letter) return false;
  const auto [end, error] = std::from_chars(text.data() + 1, text.data() + text.size(), value);
  if (error != std::errc{}) return false;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  return true;
}

}  // namespace

std::string QuantSpec::to_string() const {
  std::string s = fmt::format("w{}a{}", wbits, abits);
  if (group_size > 0) s += fmt::format("g{}", group_size);
  if (symmetric) s += "sym";
  std::string apart;
  const ActivationBits a = activations();
  for (const auto& [letter, bits, usual] :
       {std::tuple{'q', a.q, abits}, std::tuple{'k', a.k, abits}, std::tuple{'v', a.v, abits},
        std::tuple{'p', a.p, 16}})
    if (bits != usual) apart += fmt::format("{}{}", letter, bits);
  return apart.empty() ? s : s + "-" + apart;
}

QuantSpec QuantSpec::parse(std::string_view text) {
  std::string_view rest = text;
  int64_t w = 0, a = 16, g = 0;
  const bool ok = take(rest, 'w', w) && take(rest, 'a', a);
  if (ok && !rest.empty()) take(rest, 'g', g);
  QuantSpec spec;
  if (rest == "sym") {
    spec.symmetric = true;
    rest = {};
  }
  check(ok && rest.empty(), "quantisation setting \"{}\": wanted something like w4a16 or w3a16g64",
        text);
  check(w >= 2 && w <= 8, "quantisation setting \"{}\": weights of {} bits, 2 to 8 wanted", text,
        w);
  check((a >= 2 && a <= 8) || a == 16,
        "quantisation setting \"{}\": activations of {} bits, 2 to 8 or 16 wanted", text, a);
  spec.wbits = static_cast<int>(w);
  spec.abits = static_cast<int>(a);
  spec.group_size = g;
  validate(spec);
  return spec;
}

void validate(const QuantSpec& s) {
  check(s.wbits >= 2 && s.wbits <= 8, "wbits = {}: 2 to 8 are supported", s.wbits);
  const ActivationBits a = s.activations();
  for (const auto& [name, bits] :
       {std::pair{"abits", a.linear}, std::pair{"q_bits", a.q}, std::pair{"k_bits", a.k},
        std::pair{"v_bits", a.v}, std::pair{"p_bits", a.p}})
    check((bits >= 2 && bits <= 8) || bits == 16,
          "{} = {}: 2 to 8, or 16 for activations as they are", name, bits);
  for (const auto& [name, share] : {std::pair{"act_clip", s.act_clip}, {"qkv_clip", s.qkv_clip}})
    check(share > 0 && share <= 1, "{} = {}: above 0 and at most 1", name, share);
  check(s.group_size >= 0 && s.group_size <= (int64_t{1} << 20),
        "group size {}: 0 (per channel) or a positive number", s.group_size);
}

}  // namespace omq::quant
