// The instruction set and the number of threads as they were, at the end of a scope.
#pragma once

#include <string>

#include "tensor/isa.h"
#include "tensor/parallel.h"

namespace omq {

struct Restore {
  std::string isa = packed_isa_name();
  int threads = num_threads();
  ~Restore() {
    force_packed_isa(isa);
    set_num_threads(threads);
  }
};

}  // namespace omq
