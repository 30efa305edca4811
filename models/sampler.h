// Sampler: from a row of logits to the next token.
//
// The chain is llama.cpp's default one, in its order: logit bias → penalties over the last n tokens
// → top-k → top-p → min-p → temperature → draw. Temperature 0 takes the largest logit after bias
// and penalties, the lowest id on ties. Random numbers are xoshiro256++ (Blackman and Vigna 2018),
// our own code: one seed draws the same on every machine.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace omq {

struct SamplerOptions {
  double temperature = 0.8;  // 0: greedy
  int64_t top_k = 40;        // keep the k largest; 0: all
  double top_p = 0.95;       // then the fewest that hold this share of the probability; 1: all
  double min_p = 0.05;       // then those at least this share as probable as the largest; 0: all
  double repeat_penalty =
      1.0;  // positive logits of repeated tokens are divided by it, negative ones multiplied
  int64_t repeat_last_n = 64;  // how far back penalties look; −1: to the start, 0: no penalties
  double presence_penalty = 0.0;                       // subtracted once from a token that occurred
  double frequency_penalty = 0.0;                      // subtracted for each time that it occurred
  std::vector<std::pair<int32_t, double>> logit_bias;  // token, added; −infinity forbids the token
  uint64_t seed = 0;

  // Whether the largest logit is taken as it is.
  bool takes_largest() const;
  // Whether tokens so far matter.
  bool penalises() const;
  // Throws Error naming the option that is out of range; ids are checked against `vocab_size`.
  void validate(int64_t vocab_size) const;
};

// 64 random bits a call.
class Xoshiro256 {
 public:
  explicit Xoshiro256(uint64_t seed);
  uint64_t next();
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)

 private:
  std::array<uint64_t, 4> state_;
};

struct Candidate {
  int32_t id;
  double logit;        // after bias and penalties
  double probability;  // among those that are left, at the temperature
};

class Sampler {
 public:
  explicit Sampler(SamplerOptions options);

  // logits [V] of the next token; history: all tokens so far, the prompt's too. Its memory is kept
  // from call to call. Every token is drawn by one random number, at temperature 0 by none. Throws
  // Error on NaN, and when every token is forbidden.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> history);
  // The numbers in [0, 1) that the next tokens would be drawn by, for who draws them elsewhere.
  void take_numbers(std::span<double> numbers);
  // What sample() draws from, most probable first; one candidate at temperature 0.
  std::vector<Candidate> candidates(std::span<const float> logits,
                                    std::span<const int32_t> history) const;
  const SamplerOptions& options() const { return options_; }

 private:
  struct Work {
    std::vector<double> logits;   // [V], after bias and penalties
    std::vector<int32_t> recent;  // what penalties look at, sorted
    std::vector<Candidate> list;
  };
  void adjust(std::span<const float> logits, std::span<const int32_t> history, Work& work) const;
  void choose(std::span<const float> logits, std::span<const int32_t> history, Work& work) const;

  SamplerOptions options_;
  Xoshiro256 random_;
  Work work_;
};

}  // namespace omq
