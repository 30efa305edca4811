// QuantSpec: the bits of weights and activations and the group size, in the notation of the papers:
// "w4a16g128".
#pragma once

#include <string>
#include <string_view>

#include "tensor/packed.h"

namespace omq::quant {

struct QuantSpec {
  int wbits = 4;           // 2…8
  int abits = 16;          // 16: activations are not quantised
  int64_t group_size = 0;  // 0: per output channel
  bool symmetric = false;

  GroupSpec weight() const {
    return {.bits = wbits, .group_size = group_size, .symmetric = symmetric};
  }
  std::string to_string() const;  // "w4a16g128", "w3a16"
  // Throws Error when the text is not of the form wNaM[gG] or a number is out of range.
  static QuantSpec parse(std::string_view text);
};

// Throws Error naming the field when bits or group size cannot be used.
void validate(const QuantSpec& spec);

}  // namespace omq::quant
