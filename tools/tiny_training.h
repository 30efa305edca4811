// Training of the bundled model: stories → tokens → windows → AdamW with a cosine schedule.
//
// Every token is seen once (the grammar does not run dry), so there is nothing to overfit;
// calibration and test text come from splits that training never draws from.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "models/tokenizer.h"
#include "tools/story_grammar.h"
#include "tools/tiny_model.h"

namespace omq {

struct TinyOptions {
  uint64_t seed = 1;
  int64_t steps = 3600, batch = 8, window = 256;
  // Shape of the model. 96 and 288 are no multiples of 64 and 128: groups end short, as in real
  // models.
  int64_t hidden = 96, layers = 4, heads = 6, kv_heads = 2, ffn = 288, vocab = 512;
  double lr = 4e-3, weight_decay = 0.1, clip = 1.0;  // clip: largest norm of all gradients together
  size_t calib_bytes = 120'000, test_bytes = 60'000;
};

// LLaMA configuration of these sizes. Throws Error when they do not fit together.
ModelConfig tiny_config(const TinyOptions& options);

// A tokenizer trained on the first stories of the training split.
Tokenizer tiny_tokenizer(const TinyOptions& options);

// Endless token ids of the training split: stories, an empty line after each, and after every
// second one on average the end token, so that a model learns both to stop and to go on.
class StoryTokens {
 public:
  StoryTokens(const Tokenizer& tokenizer, uint64_t seed);
  // Inputs I32 [batch, window] and the targets that follow them I32 [batch · window].
  struct Batch {
    Tensor ids, targets;
  };
  Batch next(int64_t batch, int64_t window);

 private:
  void fill(size_t n);

  const Tokenizer& tokenizer_;
  uint64_t seed_, story_ = 0;
  StoryRandom ends_;
  std::vector<int32_t> ids_;
};

struct TinyStep {
  int64_t step = 0;  // from 1
  double loss = 0;   // mean over the batch, nats per token
  double lr = 0, gradient_norm = 0;
};

// Trains and calls report after every step. Throws Error when the loss is not finite.
TinyModel train_tiny(const TinyOptions& options, const Tokenizer& tokenizer,
                     const std::function<void(const TinyStep&, const TinyModel&)>& report);

}  // namespace omq
