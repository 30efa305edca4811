// Rotary tables: cos and sin of position × frequency, with the frequency scalings that checkpoints
// ask for.
#pragma once

#include <span>

#include "tensor/tensor.h"

namespace omq::nn {

// How frequencies are scaled (config.json rope_scaling; spec interop-formats §8).
struct RopeScaling {
  enum class Type { None, Linear, Llama3 } type = Type::None;
  double factor = 1.0;
  double low_freq_factor = 1.0, high_freq_factor = 4.0;
  double original_max_positions = 8192;
};

struct RopeTables {
  Tensor cos, sin;  // F32 (or F64) [positions, d/2]
};

// Inverse frequencies f_i = θ^(−2i/d), scaled: [d/2] in double. `divisors` (GGUF's rope_freqs;
// empty: none) divide them.
std::vector<double> rope_frequencies(int64_t head_dim, double theta, const RopeScaling& scaling,
                                     std::span<const float> divisors = {});

// Angles are formed in double and rounded once.
RopeTables rope_tables(std::span<const double> frequencies, int64_t positions,
                       DType dtype = DType::F32);

}  // namespace omq::nn
