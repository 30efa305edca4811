// Where the scales of a transformation start: from the largest activation and the largest weight of
// each channel (spec omniquant §4.2).
#pragma once

#include <vector>

#include "nn/block.h"

namespace omq::quant {

std::vector<double> doubles(const Tensor& t);
// A parameter [n] in the wide type of `like`, on its device.
Tensor parameter_of(const std::vector<double>& v, const Tensor& like);

// The largest |W| (with `signed_max` the largest W) of each input channel over the matrices' rows.
std::vector<double> column_max(const std::vector<const nn::Linear*>& readers, bool signed_max);

// s = a^α / w^(1−α) of each channel: activations are divided by s, weights multiplied. Throws Error
// when abs_max [n] is undefined.
std::vector<double> start_scale(const Tensor& abs_max, const std::vector<double>& w, double alpha);

}  // namespace omq::quant
