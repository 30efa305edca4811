// The pre-tokenizer expressions of GPT-2, Llama-3 and Qwen2, and digits, matched by hand.
//
// Each alternative of the expression is a function that returns where it would end, or begin for
// "no match"; they are tried in the order written, as a backtracking engine does. Serves builds
// without PCRE2 and checks builds with it. Reference: spec/interop-formats.md §9;
// models/pretokenizer.h has the expressions.

#include <algorithm>

#include "models/pretokenizer.h"
#include "models/tokenizer_utf8.h"

namespace omq {

namespace {

struct Rules {
  bool gpt2;       // GPT-2's form; else that of Llama-3 and Qwen2
  int max_digits;  // \p{N}{1,max}; Llama-3 3, Qwen2 1
};

// The text as code points with classes, so that looking back and ahead is an index.
struct Chars {
  std::vector<char32_t> code;
  std::vector<CharClass> kind;
  std::vector<size_t> offset;  // bytes; one more than code
  explicit Chars(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
      offset.push_back(i);
      code.push_back(utf8_next(text, i));
      kind.push_back(char_class(code.back()));
    }
    offset.push_back(text.size());
  }
  size_t size() const { return code.size(); }
  bool is(size_t i, CharClass c) const { return i < size() && kind[i] == c; }
  bool newline(size_t i) const { return i < size() && (code[i] == '\r' || code[i] == '\n'); }
  size_t run(size_t i, CharClass c) const {
    while (is(i, c)) ++i;
    return i;
  }
  size_t newlines(size_t i) const {
    while (newline(i)) ++i;
    return i;
  }
};

// 's 't 're 've 'm 'll 'd
size_t contraction(const Chars& t, size_t i, bool any_case) {
  if (t.code[i] != '\'') return i;
  const auto at = [&](size_t k) -> char32_t {
    if (k >= t.size()) return 0;
    const char32_t c = t.code[k];
    if (!any_case) return c;
    if (c == 0x17F) return 's';  // long s folds to s
    return c >= 'A' && c <= 'Z' ? c + 32 : c;
  };
  const char32_t a = at(i + 1), b = at(i + 2);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return i + 3;
  return i;
}

// " ?" followed by a run of one class
size_t spaced_run(const Chars& t, size_t i, CharClass c) {
  const size_t start = t.code[i] == ' ' && t.is(i + 1, c) ? i + 1 : i;
  const size_t end = t.run(start, c);
  return end > start ? end : i;
}

// [^\r\n\p{L}\p{N}]?\p{L}+
size_t led_letters(const Chars& t, size_t i) {
  if (t.is(i, CharClass::Letter)) return t.run(i, CharClass::Letter);
  if (t.is(i, CharClass::Number) || t.newline(i)) return i;
  const size_t end = t.run(i + 1, CharClass::Letter);
  return end > i + 1 ? end : i;
}

// \s*[\r\n]+ : up to the last line end within the white space
size_t line_ends(const Chars& t, size_t i) {
  size_t end = t.run(i, CharClass::Space);
  while (end > i && !t.newline(end - 1)) --end;
  return end;
}

// \s+(?!\S)|\s+ : white space, but its last character leads the next word if there is one
size_t white_space(const Chars& t, size_t i) {
  const size_t end = t.run(i, CharClass::Space);
  return end == t.size() || end <= i + 1 ? end : end - 1;
}

size_t match_at(const Chars& t, size_t i, const Rules& rules) {
  if (size_t e = contraction(t, i, !rules.gpt2); e > i) return e;
  if (rules.gpt2) {
    for (const CharClass c : {CharClass::Letter, CharClass::Number, CharClass::Other})
      if (size_t e = spaced_run(t, i, c); e > i) return e;
    return white_space(t, i);
  }
  if (size_t e = led_letters(t, i); e > i) return e;
  if (t.is(i, CharClass::Number))
    return std::min(t.run(i, CharClass::Number), i + static_cast<size_t>(rules.max_digits));
  if (size_t e = spaced_run(t, i, CharClass::Other); e > i) return t.newlines(e);
  if (size_t e = line_ends(t, i); e > i) return e;
  return white_space(t, i);
}

class WordPattern : public Pattern {
 public:
  explicit WordPattern(Rules rules) : rules_(rules) {}
  void find_all(std::string_view text, std::vector<TextSpan>& matches) const override {
    const Chars chars(text);
    for (size_t i = 0; i < chars.size();) {
      const size_t end = std::max(i + 1, match_at(chars, i, rules_));
      matches.push_back({chars.offset[i], chars.offset[end]});
      i = end;
    }
  }

 private:
  Rules rules_;
};

class DigitPattern : public Pattern {
 public:
  explicit DigitPattern(bool runs) : runs_(runs) {}
  void find_all(std::string_view text, std::vector<TextSpan>& matches) const override {
    bool in_run = false;
    for (size_t i = 0; i < text.size();) {
      const size_t begin = i;
      const bool digit = char_class(utf8_next(text, i)) == CharClass::Number;
      if (digit && in_run && runs_)
        matches.back().end = i;
      else if (digit)
        matches.push_back({begin, i});
      in_run = digit;
    }
  }

 private:
  bool runs_;
};

}  // namespace

std::unique_ptr<const Pattern> known_pattern(std::string_view expression) {
  if (expression == kGpt2Pattern) return std::make_unique<WordPattern>(Rules{true, 0});
  if (expression == kLlama3Pattern) return std::make_unique<WordPattern>(Rules{false, 3});
  if (expression == kQwen2Pattern) return std::make_unique<WordPattern>(Rules{false, 1});
  if (expression == kDigitPattern) return std::make_unique<DigitPattern>(false);
  if (expression == kDigitRunPattern) return std::make_unique<DigitPattern>(true);
  return nullptr;
}

}  // namespace omq
