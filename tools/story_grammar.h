// Stories for the bundled model: a small grammar that writes any number of them from a seed.
//
// Every story has facts that return later and must agree with what was said: who "she" is, how many
// apples are left after two were given away, the colour of the basket, the day after Friday, the
// hat that a sunny day asks for. So a model must look back to do well, which is what low-bit
// weights break first. train-tiny trains on some seeds and leaves others for calibration and test
// text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace omq {

// SplitMix64: the same numbers everywhere, unlike the distributions of <random>, which each library
// defines anew.
class StoryRandom {
 public:
  explicit StoryRandom(uint64_t seed) : state_(seed) {}
  uint64_t next();
  // Uniform in [0, n), n ≥ 1.
  size_t below(size_t n);
  // Uniform in [lo, hi].
  int between(int lo, int hi) {
    return lo + static_cast<int>(below(static_cast<size_t>(hi - lo + 1)));
  }
  // True in `percent` of 100 cases.
  bool chance(int percent) { return below(100) < static_cast<size_t>(percent); }

 private:
  uint64_t state_;
};

// Which seeds a text draws from; no two splits share one.
enum class StorySplit : uint64_t { Train = 0, Calib = 1, Test = 2 };

// The seed of story `index` of a split.
uint64_t story_seed(uint64_t seed, StorySplit split, uint64_t index);

// One story: a paragraph of about ten sentences in ASCII, without a newline.
std::string make_story(uint64_t seed);

// Whole stories of a split from the first on, each followed by an empty line, until there are at
// least `bytes` bytes.
std::string make_stories(uint64_t seed, StorySplit split, size_t bytes);

}  // namespace omq
