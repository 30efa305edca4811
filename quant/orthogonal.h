// Orthogonal matrices that spread one large entry over a whole row: Hadamard matrices where one can
// be constructed, random ones elsewhere, and Kronecker products of both for the sizes of models.
// F64, in host memory.
#pragma once

#include "nn/kronecker.h"
#include "tensor/random.h"

namespace omq::quant {

// Whether hadamard(n) can be constructed: Sylvester (powers of two), Paley I (n − 1 a prime ≡ 3 mod
// 4), Paley II (n/2 − 1 a prime ≡ 1 mod 4), and twice any of these.
bool hadamard_exists(int64_t n);
// H [n, n] of 1 and −1 with H·Hᵀ = n·I. Throws Error where none can be constructed.
Tensor hadamard(int64_t n);

// Uniformly distributed over all orthogonal [n, n] (QR of a Gaussian matrix with a positive
// diagonal of R). The same random numbers give the same matrix.
Tensor random_orthogonal(int64_t n, const Philox& random);

// Orthogonal [n, n]: H/√n, or H_{2^k}/√(2^k) ⊗ random_orthogonal(m) with n = 2^k·m, m odd.
Tensor orthogonal_factor(int64_t n, const Philox& random);

// n = left·right: left a power of two, the sum of the two small, since that is the work of
// transforming a row, and right the order of a Hadamard matrix if that costs less than twice the
// work. A factor of 1 is none: 0.
struct FactorSizes {
  int64_t left = 0, right = 0;
};
FactorSizes factor_sizes(int64_t n);
// An orthogonal transform of rows of n ≥ 2 numbers.
nn::Kronecker orthogonal_kronecker(int64_t n, const Philox& random);

}  // namespace omq::quant
