// Rotations of a whole network (QuaRot, arXiv 2404.00456; spec transform-methods §0): orthogonal
// changes of basis that leave its output as it is and spread outliers of activations over all
// channels. In contrast to a Transform they are fixed before calibration, which then sees the
// rotated network, so that every clip, rounding and training composes with them.
//
//   part        what is rotated                fused into                           stays online
//   residual    the residual stream, by Q      embedding, o and down (outputs),     –
//                                              q, k, v, gate, up, head (inputs)
//   norms       what norms give, gains in it   signs into the gain, all of it into  L ⊗ R before
//                                              q, k, v, gate, up (inputs)           each of these
//   values      v, a matrix a key/value head   v (rows), o (columns)                –
//   heads       o's input, across heads        o (columns)                          h×h before o
//   down        silu(gate)·up                  signs into up, the rest into down    L ⊗ R before
//   down query_key   q and k behind RoPE, a head    –                                    L ⊗ R on q
//   and k
//
// An RMSNorm commutes with Q once its gain is in the matrices that read it; that is done first. So
// Q mixes channels before gains weigh them; `norms` mixes them afterwards, and is not free.
// Everything is computed in F64 and rounded once, to the type that the block has.
#pragma once

#include <cstdint>

#include "nn/block.h"
#include "quant/spec.h"

namespace omq::quant {

struct RotationOptions {
  uint64_t seed = 0;  // of signs, and of what is no Hadamard matrix
  bool residual = true, values = true;
  bool norms = false, heads = false, down = false, query_key = false;
  bool operator==(const RotationOptions&) const = default;
};

// The fused ones, and of those that stay online the ones whose signal is quantised.
// behind_norms: `norms`, where inputs of matrices are quantised, in place of `residual`.
RotationOptions rotations_for(const QuantSpec& spec, uint64_t seed, bool behind_norms = false);

// x ↦ (x ⊙ s)·(L ⊗ R) with random signs s: an orthogonal n × n matrix. F64, in host memory.
class Rotation {
 public:
  // Rotations of one seed and different streams are independent.
  Rotation(int64_t n, uint64_t seed, uint64_t stream);
  Tensor operator()(const Tensor& x) const;  // F64 [..., n] → [..., n]
  Tensor inverse(const Tensor& x) const;     // F64 [..., n] → [..., n]
  const Tensor& signs() const { return signs_; }
  const nn::Kronecker& factors() const { return factors_; }

 private:
  Tensor signs_;  // [n]
  nn::Kronecker factors_, transposed_;
};

// Q of the residual stream.
Rotation residual_rotation(int64_t hidden, uint64_t seed);

// Rotates block number `index`, dense and in host memory, in place. residual: of the block's hidden
// size; used when the options say so.
void rotate_block(nn::Block& block, int index, const Rotation& residual,
                  const RotationOptions& options);
// F32 (rows ⊙ gain)·Q, for tables [V, D] of any float type: the embedding; the head with the final
// norm's gain [D] (which becomes 1). gain may be undefined.
Tensor rotate_rows(const Tensor& rows, const Tensor& gain, const Rotation& residual);

// The blocks of another source, rotated.
class RotatedSource final : public nn::BlockSource {
 public:
  RotatedSource(nn::BlockSource& plain, int64_t hidden, const RotationOptions& options);
  int size() const override { return plain_.size(); }
  std::unique_ptr<nn::Block> load(int i) override;
  std::string name(int i) const override { return plain_.name(i); }
  Tensor embed(const Tensor& ids) override;
  nn::RopeTables rope(int64_t positions) override { return plain_.rope(positions); }

 private:
  nn::BlockSource& plain_;
  RotationOptions options_;
  Rotation residual_;
};

}  // namespace omq::quant
