// The part of omq-quant's command line that is about activations: their bits, the equivalent
// transformation, and the official code's choices.
#pragma once

#include <optional>

#include "quant/recipe.h"
#include "tools/cli.h"

namespace omq {

struct TransformFlags {
  std::optional<int> abits, q_bits, k_bits, v_bits, p_bits;
  bool let = false, no_let = false, shift = false, no_shift = false, up_down = false;
  std::optional<double> let_lr, alpha, act_clip, qkv_clip;
  std::optional<int64_t> rotation_seed;
  std::string rotate;
  bool learn_act_clip = false, no_learn_act_clip = false;
  bool parity = false, untied = false, range = false, symmetric = false, signed_max = false,
       one_consumer = false;
};

void add_transform_options(CLI::App& app, TransformFlags& flags);

// Flags into spec and recipe options. Throws UsageError for flags that exclude each other.
void settle_transform(const TransformFlags& flags, quant::Options& options);

// Throws UsageError for flags that have nothing to act on in the recipe that came out.
void check_transform(const TransformFlags& flags, const quant::Recipe& recipe);

}  // namespace omq
