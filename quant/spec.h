// QuantSpec: the bits of weights and activations and the group size, in the notation of the papers:
// "w4a16g128".
#pragma once

#include <string>
#include <string_view>

#include "tensor/packed.h"
#include "tensor/row_quant.h"

namespace omq::quant {

// Bits of what flows through a block; 16: as it is. The inputs of linears have one grid a token; q,
// k and v one a token and head; the attention's probabilities one a query.
struct ActivationBits {
  int linear = 16, q = 16, k = 16, v = 16, p = 16;
  bool any() const { return linear < 16 || q < 16 || k < 16 || v < 16 || p < 16; }
  bool operator==(const ActivationBits&) const = default;
};

struct QuantSpec {
  int wbits = 4;           // 2…8
  int abits = 16;          // inputs of linears, 2…8; 16: activations are not quantised
  int64_t group_size = 0;  // 0: per output channel
  bool symmetric = false;
  int q_bits = 0, k_bits = 0, v_bits = 0;  // 0: as abits
  int p_bits = 16;
  // Grids of the official code (spec omniquant §2.3), for comparisons with it. Ranges: of weights
  // and activations not widened to hold 0, so that zero points may leave the codes and cannot be
  // stored. Symmetric: the middle is 2ᵇ⁻¹ − 1 and one code is unused; stored with zero points.
  bool official_range = false, official_symmetric = false;
  // Share of a row's range that codes of activations span, (0, 1]: inputs of linears; q, k and v.
  double act_clip = 1, qkv_clip = 1;

  GroupSpec weight() const {
    return {.bits = wbits,
            .group_size = group_size,
            .symmetric = symmetric && !official_symmetric,
            .include_zero = !official_range};
  }
  ActivationBits activations() const {
    auto or_abits = [this](int bits) { return bits > 0 ? bits : abits; };
    return {abits, or_abits(q_bits), or_abits(k_bits), or_abits(v_bits), p_bits};
  }
  RowQuant rows(int bits, double clip = 1) const {
    return {.bits = bits, .include_zero = !official_range, .clip = clip};
  }
  // "w4a16g128", "w3a16"; bits of q, k, v, p that differ follow: "w4a4-k8v8".
  std::string to_string() const;
  // Throws Error when the text is not of the form wNaM[gG][sym] or a number is out of range.
  static QuantSpec parse(std::string_view text);
};

// Throws Error naming the field when bits or group size cannot be used.
void validate(const QuantSpec& spec);

}  // namespace omq::quant
