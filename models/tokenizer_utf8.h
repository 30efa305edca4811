// UTF-8 and Unicode text for the tokenizers: strict decoding, replacement of bad bytes,
// composition.
//
// Bad bytes are replaced as Rust's and Python's lossy decoders do it (one U+FFFD for each maximal
// part of an ill-formed character), so that our output equals Hugging Face's. Reference: Unicode
// 15, §3.9 and UAX #15.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace omq {

struct Utf8Char {
  enum Kind { Valid, Invalid, Incomplete };  // Incomplete: text ends inside it
  Kind kind;
  size_t length;  // bytes; of the ill-formed part when not Valid
  char32_t code;  // U+FFFD when not Valid
};

// The character at text[i]; i < text.size().
Utf8Char utf8_at(std::string_view text, size_t i);
// Code point at text[i] of a text known to be valid; i moves past it.
char32_t utf8_next(std::string_view text, size_t& i);
void utf8_append(std::string& out, char32_t c);
// The text itself when valid, else a copy in `storage` with U+FFFD in place of bad bytes.
std::string_view utf8_valid(std::string_view text, std::string& storage);
// Moves the complete characters of `pending` behind `out`; with `final` also an incomplete tail, as
// U+FFFD.
void utf8_take(std::string& pending, bool final, std::string& out);

enum class CharClass : unsigned char { Letter, Number, Space, Other };
// Unicode general category L*, N*, the property White_Space, anything else.
CharClass char_class(char32_t c);

// Canonical composition (NFC) of valid UTF-8 (tokenizer_nfc.cpp).
std::string to_nfc(std::string_view text);

}  // namespace omq
