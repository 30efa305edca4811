// Learnable Equivalent Transformation (paper Eq. 3 and 5): per-channel scales s and shifts δ that
// move what is hard to quantise from activations to weights, or back.
//
//   site            upstream                              downstream
//   norm → linears  γ/s, (β − δ)/s                        W·diag(s), b + W·δ
//   v → o           diag(1/s)·W_v, (b_v − δ)/s            W_o·diag(ex s), b_o + W_o·ex δ
//   q – k           diag(1/ex s)·W_q, b_q/ex s            diag(s)·W_k, b_k·s
//   up → down       diag(1/s)·W_up, b_up/s                W_down·diag(s)
//
// ex repeats a key/value head's entries for the query heads that share it; the value shift passes
// through attention since probabilities sum to 1. Rotary positions mix channels i and i + d/2 of a
// head, so a q–k scale is exact only when such a pair has one entry; `tied_pairs` learns one
// (spec omniquant §4).
#pragma once

#include "quant/stats.h"
#include "quant/transform.h"

namespace omq::quant {

struct LetOptions {
  double alpha = 0.5;              // s starts at a^α / w^(1−α): a of activations, w of weights
  bool shift = false;              // learn δ, from 0
  bool shift_from_middle = false;  // … from the middle of each channel's range instead
  bool tied_pairs = true;          // false: official, inexact under rotary positions
  bool up_to_down = false;         // the optional site
  bool all_consumers = true;  // w is the largest of all that read the channel; false: of one of
                              // them, as the official code
  bool signed_max = false;    // w = max W without | |: the paper's first releases
};

// Scales below this are put back to it (spec omniquant §4.3).
inline constexpr double kSmallestScale = 1e-2;

// One transform over all sites of fp. Its params are named after their site: "qkv_scale", … Throws
// Error when a site's statistics are missing.
std::unique_ptr<Transform> learned_transform(nn::Block& fp, const BlockStats& stats,
                                             const LetOptions& options);

}  // namespace omq::quant
