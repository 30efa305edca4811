// Strict UTF-8 decoding and character classes; see tokenizer_utf8.h.

#include "models/tokenizer_utf8.h"

#include <algorithm>
#include <array>
#include <iterator>

#include "models/unicode_tables.h"

namespace omq {

Utf8Char utf8_at(std::string_view text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[k]); };
  const unsigned char lead = byte(i);
  if (lead < 0x80) return {Utf8Char::Valid, 1, lead};
  // The second byte's range depends on the lead: it keeps out overlong forms, surrogates and >
  // U+10FFFF.
  size_t length = 0;
  unsigned char low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {Utf8Char::Invalid, 1, 0xFFFD};
  }
  char32_t code = lead & (0xFF >> (length + 1));
  for (size_t k = 1; k < length; ++k) {
    if (i + k == text.size()) return {Utf8Char::Incomplete, k, 0xFFFD};
    const unsigned char b = byte(i + k);
    if (b < low || b > high) return {Utf8Char::Invalid, k, 0xFFFD};
    code = (code << 6) | (b & 0x3F);
    low = 0x80, high = 0xBF;
  }
  return {Utf8Char::Valid, length, code};
}

char32_t utf8_next(std::string_view text, size_t& i) {
  const Utf8Char c = utf8_at(text, i);
  i += c.length;
  return c.code;
}

void utf8_append(std::string& out, char32_t c) {
  const auto put = [&](char32_t b) { out.push_back(static_cast<char>(b)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F));
    put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  }
}

void utf8_take(std::string& pending, bool final, std::string& out) {
  size_t i = 0;
  while (i < pending.size()) {
    const Utf8Char c = utf8_at(pending, i);
    if (c.kind == Utf8Char::Incomplete && !final) break;
    if (c.kind == Utf8Char::Valid)
      out.append(pending, i, c.length);
    else
      utf8_append(out, 0xFFFD);
    i += c.length;
  }
  pending.erase(0, i);
}

std::string_view utf8_valid(std::string_view text, std::string& storage) {
  for (size_t i = 0; i < text.size();) {
    const Utf8Char c = utf8_at(text, i);
    if (c.kind != Utf8Char::Valid) {
      std::string pending(text);
      storage.clear();
      utf8_take(pending, true, storage);
      return storage;
    }
    i += c.length;
  }
  return text;
}

namespace {

template <size_t N> bool in_ranges(const char32_t (&ranges)[N], char32_t c) {
  // ranges = first, last, first, last, …: c is inside when an odd number of bounds lies at or below
  // it, the last of a range counting as one past itself.
  const auto* above = std::upper_bound(std::begin(ranges), std::end(ranges), c);
  const auto index = above - std::begin(ranges);
  return index % 2 == 1 || (index > 0 && ranges[index - 1] == c);
}

CharClass classify(char32_t c) {
  if (in_ranges(kLetterRanges, c)) return CharClass::Letter;
  if (in_ranges(kNumberRanges, c)) return CharClass::Number;
  if (in_ranges(kSpaceRanges, c)) return CharClass::Space;
  return CharClass::Other;
}

}  // namespace

CharClass char_class(char32_t c) {
  static const auto ascii = [] {
    std::array<CharClass, 128> table{};
    for (char32_t i = 0; i < 128; ++i) table[i] = classify(i);
    return table;
  }();
  return c < 128 ? ascii[c] : classify(c);
}

}  // namespace omq
