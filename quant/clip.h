// Clip: from a weight matrix to its quantisation grid. One object per linear layer, since it may
// hold learnables.
#pragma once

#include <memory>

#include "nn/adamw.h"
#include "tensor/packed.h"

namespace omq::quant {

// w ≈ scale · (code − zero), one pair for each row and group. Zero points are whole numbers in [0,
// 2ᵇ−1].
struct Grid {
  Tensor scale, zero;  // F32 [rows, groups]
};

struct Clip {
  virtual ~Clip() = default;
  virtual Grid grid(
      const Tensor& w) const = 0;  // w [rows, cols]; differentiable where there are learnables
  // w quantised and dequantised on its grid: what training computes with. By default on_grid() of
  // grid(), which a clip may do in fewer passes.
  virtual Tensor quantized(const Tensor& w, GroupSpec spec) const;
  // w on a grid with the gradient rule of this clip (spec weight-methods §13); by default that of
  // clipped ranges: to w and the scale, none through clamped or end codes, none to the zero point.
  virtual Tensor on_grid(const Tensor& w, const Grid& grid, GroupSpec spec) const;
  virtual nn::ParamGroup params() const { return {}; }  // empty: nothing to learn
  // Some clips start from what the matrix will be multiplied with: w and x [tokens, cols], both F32
  // and on one device. They say so, and are then told once, before anything is learned.
  virtual bool starts_from_inputs() const { return false; }
  virtual void start(const Tensor& /*w*/, const Tensor& /*x*/) {}
};

// The grid that spans [lo, hi] (spec omniquant §2.3): asymmetric h = (hi − lo)/(2ᵇ−1), z = ⌊−lo/h⌉;
// symmetric h = max(|hi|, |lo|)/(2ᵇ⁻¹ − ½), z = 2ᵇ⁻¹. hi ≥ 0 ≥ lo, [rows, groups]. No gradient goes
// through z.
// With !spec.include_zero as the official code: hi and lo of one sign are taken as they are, and z
// is limited to ±1e4 only.
Grid affine_grid(const Tensor& hi, const Tensor& lo, GroupSpec spec);
// The official symmetric grid: h = max(|hi|, |lo|)/(2ᵇ⁻¹ − 1), z = 2ᵇ⁻¹ − 1.
Grid official_symmetric_grid(const Tensor& hi, const Tensor& lo, GroupSpec spec);
using GridRule = Grid (*)(const Tensor& hi, const Tensor& lo, GroupSpec spec);

// Plain min–max: the whole range of each group. What RTN uses.
std::unique_ptr<Clip> minmax_clip(const Tensor& w, GroupSpec spec, GridRule rule = affine_grid);

// The share of each group's range, both ends alike, that leaves the least squared error of the
// weights: what QuaRot rounds on (spec transform-methods §6.3).
std::unique_ptr<Clip> searched_clip(const Tensor& w, GroupSpec spec, GridRule rule = affine_grid);

struct LearnedClipOptions {
  double logit = 4.0;  // start of both learnables: σ(4) ≈ 0.982 of the range
  GridRule rule = affine_grid;
  // Start instead, row by row and group by group, at the share of the range among σ(logit), 0.95,
  // 0.90, … 0.55 whose codes change the group's part of the output least: AWQ's clip search (spec
  // omniquant §15 no. 2, §17; weight-methods on AWQ).
  bool search = false;
};
// Learnable Weight Clipping (Eq. 2): two learnables per row and group.
std::unique_ptr<Clip> learned_clip(const Tensor& w, GroupSpec spec,
                                   LearnedClipOptions options = {});

// Free scales and zero points, two learnables per row and group that start from the min–max range
// of w (EfficientQAT, spec weight-methods §1): the range is of no account any more. The zero point
// is rounded and kept within the codes at use; gradients pass both, end codes learn, and a clamped
// code tells the zero point −h. Symmetric: the scale alone.
std::unique_ptr<Clip> free_grid(const Tensor& w, GroupSpec spec);

// Shares of both ends of the range, kept in [0, 1], from 1 (SignRound, spec weight-methods §10).
// Scales are f16 values within the loop already, and the zero point passes gradients.
std::unique_ptr<Clip> scaled_range(const Tensor& w, GroupSpec spec);

}  // namespace omq::quant
