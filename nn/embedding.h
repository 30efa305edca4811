// Embedding: token ids to rows of a dense or packed table; tied models use the same table as the
// output head.
#pragma once

#include "autograd/ops.h"
#include "nn/linear.h"

namespace omq::nn {

struct Embedding {
  Weight table;  // [V, D]

  Tensor operator()(const Tensor& ids) const {  // I32 [B,T] → F32 [B,T,D]
    if (const auto* packed = std::get_if<std::shared_ptr<PackedWeight>>(&table))
      return (*packed)->embedding(ids);
    return embedding(std::get<Tensor>(table), ids);
  }
};

}  // namespace omq::nn
