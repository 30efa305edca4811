// Rounding frozen at a base point, by which straight-through gradients can be compared with
// differences.
//
// A rounding stands still and then jumps, so that its difference quotient says nothing. Its
// straight-through gradient is the exact gradient of another function: the one in which every
// rounding keeps the offset that it had at a base point, ⌊t⌉ → t + c with c = ⌊t₀⌉ − t₀, a clamped
// code stays where it was, and so does a zero point (spec omniquant §2.6). That function equals the
// real one at the base point and is smooth around it.
//
//   FrozenRounding frozen;
//   { const auto scope = frozen.record(); y = f(x0); }  // as always; decisions are noted
//   { const auto scope = frozen.replay(); y = f(x); }   // the same decisions, for any x near x0
//
// A replay has to call the same ops in the same order. The first one is made at the base point, and
// in the float type of all that follow; this need not be the type of the recording.
#pragma once

#include <vector>

#include "tensor/tensor.h"

namespace omq {

class FrozenRounding {
 public:
  // While one lives, the rounding ops of this thread note or repeat their decisions.
  class [[nodiscard]] Scope {
   public:
    explicit Scope(FrozenRounding* now);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    FrozenRounding* before_;
  };
  Scope record();
  Scope replay();
  // The one whose scope this thread is in, or null.
  static FrozenRounding* current();

  // For ops. What a rounding of t gave, and where its gradient passes (1 or 0); same shape.
  void note(const Tensor& result, const Tensor& inside);
  bool replays() const { return replays_; }
  // t + c where the gradient passes, the result of the recording elsewhere; differentiable in t.
  // Throws Error when the recording was of other ops.
  Tensor repeat(const Tensor& t);

 private:
  struct Decision {
    Tensor result, inside;  // result: until the first replay
    Tensor rest;            // result − inside·t₀
  };
  std::vector<Decision> decisions_;
  size_t next_ = 0;
  bool replays_ = false;
};

}  // namespace omq
