// Pre-tokenizer patterns: the regular expressions that cut text into words before byte-level BPE.
//
// compile_pattern() is defined twice and one is linked: pretokenizer_pcre2.cpp takes any pattern,
// pretokenizer_plain.cpp (no PCRE2) those that known_pattern() has by hand. The expressions need
// Unicode classes and a look-ahead, which std::regex lacks. Reference: spec/interop-formats.md §9.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <vector>

namespace omq {

struct TextSpan {
  size_t begin, end;  // bytes
};

class Pattern {
 public:
  virtual ~Pattern() = default;
  // Appends all non-overlapping matches in order. The text is valid UTF-8; its ends count as text
  // ends.
  virtual void find_all(std::string_view text, std::vector<TextSpan>& matches) const = 0;
};

// Never null; throws an Error that shows the expression when it cannot be compiled (or, without
// PCRE2, is not one of the known ones).
std::unique_ptr<const Pattern> compile_pattern(std::string_view expression);

// "pcre2" or "plain", for reports and tests.
std::string_view pattern_engine();

// Hand-written matcher (tokenizer_patterns.cpp) for kGpt2Pattern, kLlama3Pattern, kQwen2Pattern and
// kDigitPattern; null for any other expression. Always linked.
std::unique_ptr<const Pattern> known_pattern(std::string_view expression);

inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kDigitPattern = R"(\p{N})";
inline constexpr std::string_view kDigitRunPattern = R"(\p{N}+)";

}  // namespace omq
