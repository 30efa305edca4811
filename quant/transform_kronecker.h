// Learned affine transforms that are cheap enough to stay in the running model (FlatQuant, arXiv
// 2410.09426; spec transform-methods §0, §2): x' = x·diag(1/s)·P and W' = W·diag(s)·P⁻ᵀ make
// flat what is quantised.
//
//   site            P                              fused                        stays online
//   norm → linears  L ⊗ R, one a norm              1/s into the gain            L ⊗ R before them
//   v → o           T, one a key/value head        T into v's rows              –
//   o's input       M over the heads, ⊗ I          –                            M before o
//   up → down       L ⊗ R                          1/s into up's rows           L ⊗ R before down
//   q and k         L ⊗ R on each head             –                            k by it, q by its
//   behind RoPE                                                                 inverse transposed
//
// What undoes a part goes into the matrix that reads it; T⁻ᵀ into o's columns, once for every query
// head of the group. Factors are Invertible and start at the orthogonal ones of orthogonal.h under
// random signs, s at LET's start, its geometric mean being 1.
#pragma once

#include "quant/stats.h"
#include "quant/transform.h"

namespace omq::quant {

struct KroneckerOptions {
  double alpha = 0.3;      // s starts at a^α / w^(1−α): a of activations, w of weights
  bool diagonal = true;    // there is an s
  bool query_key = false;  // q and k behind RoPE too
  bool operator==(const KroneckerOptions&) const = default;
};

// Over all sites of fp; learnables are "qkv_scale", "qkv_left", "qkv_right"; "fc1_…"; "out_values"
// (T), "out_heads" (M); "qkt_…"; "down_…". Where a site has no statistics s starts at 1. Throws
// Error when the block has online transforms already.
std::unique_ptr<Transform> kronecker_transform(nn::Block& fp, const BlockStats& stats,
                                               const KroneckerOptions& options);

}  // namespace omq::quant
