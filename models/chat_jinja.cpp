// Jinja templates in one spelling; see chat_jinja.h. Reference: Jinja 3 documentation, "Whitespace
// Control".

#include "models/chat_jinja.h"

#include <algorithm>

#include "tensor/error.h"

namespace omq {

namespace {

constexpr std::string_view kSpaces = " \t\r\n";

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text.find(from, at)) != text.npos; at += to.size())
    text.replace(at, from.size(), to);
}

char unescape(char c) { return c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c; }

// Length of the string literal at text[i] (a quote), with both quotes.
size_t literal_length(std::string_view text, size_t i) {
  for (size_t k = i + 1; k < text.size(); ++k) {
    if (text[k] == '\\')
      ++k;
    else if (text[k] == text[i])
      return k + 1 - i;
  }
  fail("chat template: a string literal does not end");
}

std::string canonical_code(std::string_view code) {
  std::string out;
  for (size_t i = 0; i < code.size(); ++i) {
    if (code[i] == '\'' || code[i] == '"') {
      const size_t length = literal_length(code, i);
      out += '`';
      for (size_t k = i + 1; k + 1 < i + length; ++k) {
        const char c = code[k] == '\\' ? unescape(code[++k]) : code[k];
        out += c == '`' ? '\'' : c;  // no known format has a back quote
      }
      out += '`';
      i += length - 1;
    } else if (kSpaces.find(code[i]) == kSpaces.npos) {
      out += code[i];
    }
  }
  replace_all(out, "`+`", "");
  for (const char* object : {"message", "messages[0]"})
    for (const char* item : {"role", "content"})
      replace_all(out, fmt::format("{}.{}", object, item), fmt::format("{}[`{}`]", object, item));
  replace_all(out, "|trim", ".strip()");
  return out;
}

// Where the tag that starts at text[i] ends, string literals inside it skipped; past its closing
// brace.
size_t tag_end(std::string_view text, size_t i) {
  const char kind = text[i + 1];
  const std::string_view close = kind == '%' ? "%}" : kind == '{' ? "}}" : "#}";
  for (size_t k = i + 2; k + 1 < text.size(); ++k) {
    if (text.substr(k, 2) == close) return k + 2;
    if (kind != '#' && (text[k] == '\'' || text[k] == '"')) k += literal_length(text, k) - 1;
  }
  fail("chat template: a tag does not end");
}

size_t next_tag(std::string_view text, size_t from) {
  for (size_t i = from; i + 1 < text.size(); ++i)
    if (text[i] == '{' && (text[i + 1] == '%' || text[i + 1] == '{' || text[i + 1] == '#'))
      return i;
  return text.size();
}

}  // namespace

std::string canonical_jinja(std::string_view source) {
  if (source.ends_with('\n')) source.remove_suffix(1);  // as Jinja does
  std::string out;
  bool strip_left = false, after_block = false, line_start = true;
  for (size_t at = 0; at < source.size();) {
    const size_t tag = next_tag(source, at);
    std::string_view text = source.substr(at, tag - at);
    if (after_block && !strip_left && text.starts_with('\n')) {
      text.remove_prefix(1);
      line_start = true;
    }
    if (strip_left) text.remove_prefix(std::min(text.size(), text.find_first_not_of(kSpaces)));
    if (tag == source.size()) return out.append(text);
    const size_t end = tag_end(source, tag);
    const bool block = source[tag + 1] != '{';
    if (source[tag + 2] == '-') {
      text = text.substr(0, text.find_last_not_of(kSpaces) + 1);
    } else if (block) {
      const size_t newline = text.rfind('\n');
      const size_t line = newline == text.npos ? 0 : newline + 1;
      if ((line > 0 || line_start) && text.find_first_not_of(" \t", line) == text.npos)
        text = text.substr(0, line);
    }
    out += text;
    std::string_view code = source.substr(tag + 2, end - tag - 4);
    strip_left = code.ends_with('-');
    if (strip_left) code.remove_suffix(1);
    if (code.starts_with('-')) code.remove_prefix(1);
    if (source[tag + 1] != '#')
      out += fmt::format("{}{}{}", source.substr(tag, 2), canonical_code(code),
                         source.substr(end - 2, 2));
    after_block = block;
    line_start = false;
    at = end;
  }
  return out;
}

}  // namespace omq
