// Calibration windows: from text by the official project's sampling, or from token ids as they are.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "models/tokenizer.h"
#include "tensor/tensor.h"

namespace omq {

struct CalibrationWindows {
  Tensor ids;               // I32 [windows, tokens]
  std::string description;  // what was read, for the report
  std::string hash;         // sha256 of the ids, 4 bytes each, little-endian
};

// A text file of any size: corpora may be larger than what read_text_file takes for a mistake.
std::string read_corpus(const std::filesystem::path& file);

// Texts joined by two newlines and tokenised once; `count` windows of `length` tokens start where
// CPython's random.seed(seed); randint(0, tokens − length − 1) says (spec omniquant §7). Throws
// Error when the text is shorter.
CalibrationWindows windows_from_text(const std::vector<std::filesystem::path>& files,
                                     const Tokenizer& tokenizer, int64_t count, int64_t length,
                                     uint32_t seed);

// One JSON array of token ids a line, all of the same length; at most `count` of them (0: all).
// Throws Error naming the line that is malformed, of another length, or holds an id outside the
// vocabulary.
CalibrationWindows windows_from_ids(const std::filesystem::path& jsonl, int64_t vocab,
                                    int64_t count);

// CPython's generator (MT19937), as far as random.seed(int) and randint need it.
class PythonRandom {
 public:
  explicit PythonRandom(uint32_t seed);
  int64_t randint(int64_t a, int64_t b);  // both ends included

 private:
  uint32_t next();
  uint32_t state_[624];
  int at_ = 624;
};

}  // namespace omq
