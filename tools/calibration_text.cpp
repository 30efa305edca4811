// Calibration windows and CPython's random numbers.
#include "tools/calibration_text.h"

#include <bit>
#include <limits>
#include <nlohmann/json.hpp>

#include "models/hash.h"
#include "models/json_file.h"

namespace omq {
namespace {

constexpr int kN = 624, kM = 397;

CalibrationWindows finish(std::vector<int32_t> ids, int64_t count, int64_t length,
                          std::string description) {
  CalibrationWindows w;
  w.hash = sha256(std::as_bytes(std::span(ids)));
  w.ids = Tensor::from<int32_t>(ids, {count, length});
  w.description = std::move(description);
  return w;
}

}  // namespace

std::string read_corpus(const std::filesystem::path& file) {
  return read_text_file(file, std::numeric_limits<size_t>::max());
}

PythonRandom::PythonRandom(uint32_t seed) {
  // init_by_array({seed}) of the reference implementation of MT19937
  state_[0] = 19650218u;
  for (int i = 1; i < kN; ++i)
    state_[i] = 1812433253u * (state_[i - 1] ^ (state_[i - 1] >> 30)) + static_cast<uint32_t>(i);
  int i = 1;
  for (int k = 0; k < kN; ++k) {
    state_[i] = (state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * 1664525u)) + seed;
    if (++i >= kN) state_[0] = state_[kN - 1], i = 1;
  }
  for (int k = 0; k < kN - 1; ++k) {
    state_[i] = (state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * 1566083941u)) -
                static_cast<uint32_t>(i);
    if (++i >= kN) state_[0] = state_[kN - 1], i = 1;
  }
  state_[0] = 0x80000000u;
}

uint32_t PythonRandom::next() {
  if (at_ == kN) {
    for (int k = 0; k < kN; ++k) {
      const uint32_t y = (state_[k] & 0x80000000u) | (state_[(k + 1) % kN] & 0x7fffffffu);
      state_[k] = state_[(k + kM) % kN] ^ (y >> 1) ^ ((y & 1u) ? 0x9908b0dfu : 0u);
    }
    at_ = 0;
  }
  uint32_t y = state_[at_++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

int64_t PythonRandom::randint(int64_t a, int64_t b) {
  check(a <= b && b - a < 0xffffffffll, "randint: [{}, {}]", a, b);
  const auto n = static_cast<uint32_t>(b - a + 1);
  const int bits = std::bit_width(n);
  uint32_t r = next() >> (32 - bits);
  while (r >= n) r = next() >> (32 - bits);
  return a + r;
}

CalibrationWindows windows_from_text(const std::vector<std::filesystem::path>& files,
                                     const Tokenizer& tokenizer, int64_t count, int64_t length,
                                     uint32_t seed) {
  std::string text, names;
  for (const auto& file : files) {
    if (!text.empty()) text += "\n\n";
    text += read_corpus(file);
    names += (names.empty() ? "" : ", ") + file.string();
  }
  const std::vector<int32_t> tokens = tokenizer.encode(text);
  const auto total = static_cast<int64_t>(tokens.size());
  check(total > length,
        "{}: {} tokens, one calibration window needs {}; give more text or a smaller --seqlen",
        names, total, length + 1);
  check(count <= (int64_t{1} << 31) / length,
        "{} calibration windows of {} tokens are more than memory holds", count, length);
  PythonRandom random(seed);
  std::vector<int32_t> ids;
  ids.reserve(static_cast<size_t>(count * length));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = random.randint(0, total - length - 1);
    ids.insert(ids.end(), tokens.begin() + start, tokens.begin() + start + length);
  }
  return finish(std::move(ids), count, length,
                fmt::format("{} windows of {} tokens out of {} tokens of {}, seed {}", count,
                            length, total, names, seed));
}

CalibrationWindows windows_from_ids(const std::filesystem::path& jsonl, int64_t vocab,
                                    int64_t count) {
  const std::string text = read_corpus(jsonl);
  std::vector<int32_t> ids;
  int64_t windows = 0, length = 0;
  int64_t number = 0;
  for (size_t at = 0; at < text.size() && (count <= 0 || windows < count);) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line(text.data() + at, end - at);
    at = end + 1;
    ++number;
    if (line.empty()) continue;
    const auto row = nlohmann::json::parse(line, nullptr, false);
    check(row.is_array(), "{}:{}: not a JSON array of token ids", jsonl.string(), number);
    if (windows == 0) length = static_cast<int64_t>(row.size());
    check(length >= 2 && static_cast<int64_t>(row.size()) == length,
          "{}:{}: {} ids, the first window has {}", jsonl.string(), number, row.size(), length);
    for (const auto& id : row) {
      check(id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() < vocab,
            "{}:{}: {} is not a token id below {}", jsonl.string(), number, id.dump(), vocab);
      ids.push_back(id.get<int32_t>());
    }
    ++windows;
  }
  check(windows > 0, "{}: no windows of token ids", jsonl.string());
  return finish(std::move(ids), windows, length,
                fmt::format("{} windows of {} tokens, ids of {}", windows, length, jsonl.string()));
}

}  // namespace omq
