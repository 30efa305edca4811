// Unicode canonical composition (NFC), which Qwen's tokenizers apply before anything else.
//
// Decompose fully, order combining marks by class, compose again with the last starter. Reference:
// UAX #15; Hangul: The Unicode Standard §3.12.

#include <algorithm>
#include <iterator>
#include <unordered_map>
#include <vector>

#include <cstdint>
#include "models/tokenizer_utf8.h"
#include "models/unicode_normal.h"

namespace omq {

namespace {

constexpr char32_t kHangulBase = 0xAC00, kLBase = 0x1100, kVBase = 0x1161, kTBase = 0x11A7;
constexpr char32_t kLCount = 19, kVCount = 21, kTCount = 28;

struct Tables {
  std::unordered_map<char32_t, std::pair<char32_t, char32_t>>
      decomposed;  // second 0: one character
  std::unordered_map<uint64_t, char32_t> composed;
  Tables() {
    for (const auto& [c, first, second] : kCanonicalPairs) {
      decomposed[c] = {first, second};
      composed[key(first, second)] = c;
    }
    for (const auto& [c, first, second] : kExcludedPairs) decomposed[c] = {first, second};
    size_t next = 0;
    for (const auto& [first, count] : kSingleRuns)
      for (char32_t c = first; c < first + count; ++c) decomposed[c] = {kSingles[next++], 0};
  }
  static uint64_t key(char32_t a, char32_t b) { return static_cast<uint64_t>(a) << 32 | b; }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

char32_t combining_class(char32_t c) {
  if (c < kCombiningClasses[0][0]) return 0;
  const auto* row = std::lower_bound(std::begin(kCombiningClasses), std::end(kCombiningClasses), c,
                                     [](const char32_t(&r)[3], char32_t x) { return r[1] < x; });
  return row != std::end(kCombiningClasses) && (*row)[0] <= c ? (*row)[2] : 0;
}

void decompose(char32_t c, std::vector<char32_t>& out) {
  if (c >= kHangulBase && c < kHangulBase + kLCount * kVCount * kTCount) {
    const char32_t index = c - kHangulBase, t = index % kTCount;
    out.push_back(kLBase + index / (kVCount * kTCount));
    out.push_back(kVBase + index / kTCount % kVCount);
    if (t > 0) out.push_back(kTBase + t);
    return;
  }
  const auto found = tables().decomposed.find(c);
  if (found == tables().decomposed.end()) {
    out.push_back(c);
    return;
  }
  decompose(found->second.first, out);
  if (found->second.second != 0) out.push_back(found->second.second);
}

// The composition of two characters, or 0.
char32_t compose(char32_t a, char32_t b) {
  if (a >= kLBase && a < kLBase + kLCount && b >= kVBase && b < kVBase + kVCount)
    return kHangulBase + ((a - kLBase) * kVCount + (b - kVBase)) * kTCount;
  const bool lv = a >= kHangulBase && a < kHangulBase + kLCount * kVCount * kTCount &&
                  (a - kHangulBase) % kTCount == 0;
  if (lv && b > kTBase && b < kTBase + kTCount) return a + (b - kTBase);
  const auto found = tables().composed.find(Tables::key(a, b));
  return found == tables().composed.end() ? 0 : found->second;
}

void order_marks(std::vector<char32_t>& text) {
  for (auto i = text.begin(); i != text.end();) {
    if (combining_class(*i) == 0) {
      ++i;
      continue;
    }
    auto end = i;
    while (end != text.end() && combining_class(*end) != 0) ++end;
    std::stable_sort(
        i, end, [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
    i = end;
  }
}

void compose_all(std::vector<char32_t>& text) {
  size_t kept = 0, starter = text.size();  // no starter yet
  char32_t last_class = 0;
  for (const char32_t c : text) {
    const char32_t mark = combining_class(c);
    // Blocked when something between has the same or a higher class, or is itself a starter.
    const bool adjacent = starter + 1 == kept;
    if (starter < kept && (adjacent || (last_class != 0 && last_class < mark))) {
      if (const char32_t whole = compose(text[starter], c)) {
        text[starter] = whole;
        continue;
      }
    }
    if (mark == 0) starter = kept;
    last_class = mark;
    text[kept++] = c;
  }
  text.resize(kept);
}

}  // namespace

std::string to_nfc(std::string_view text) {
  // Below U+0300 everything is composed already and nothing combines.
  const bool plain = std::none_of(text.begin(), text.end(),
                                  [](char c) { return static_cast<unsigned char>(c) >= 0xCC; });
  if (plain) return std::string(text);
  std::vector<char32_t> codes;
  for (size_t i = 0; i < text.size();) decompose(utf8_next(text, i), codes);
  order_marks(codes);
  compose_all(codes);
  std::string out;
  out.reserve(text.size());
  for (const char32_t c : codes) utf8_append(out, c);
  return out;
}

}  // namespace omq
