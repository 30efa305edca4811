// See frozen.h.
#include "autograd/frozen.h"

#include "autograd/ops.h"

namespace omq {
namespace {

thread_local FrozenRounding* active = nullptr;

}  // namespace

FrozenRounding::Scope::Scope(FrozenRounding* now) : before_(active) { active = now; }
FrozenRounding::Scope::~Scope() { active = before_; }

FrozenRounding* FrozenRounding::current() { return active; }

FrozenRounding::Scope FrozenRounding::record() {
  decisions_.clear();
  replays_ = false;
  return Scope(this);
}

FrozenRounding::Scope FrozenRounding::replay() {
  next_ = 0;
  replays_ = true;
  return Scope(this);
}

void FrozenRounding::note(const Tensor& result, const Tensor& inside) {
  decisions_.push_back({result.detach(), inside.detach(), {}});
}

Tensor FrozenRounding::repeat(const Tensor& t) {
  check(next_ < decisions_.size() && decisions_[next_].inside.shape() == t.shape(),
        "frozen rounding: rounding {} of {} is not the recorded one", next_ + 1, t.shape());
  Decision& d = decisions_[next_++];
  if (!d.rest.defined()) {
    NoGrad off;
    d.inside = to(d.inside, t.dtype());
    d.rest = to(d.result, t.dtype()) - d.inside * t.detach();
    d.result = {};
  }
  return d.inside * t + d.rest;
}

}  // namespace omq
