// What a report says of each matrix and of the transformation: how far the committed matrix is from
// full precision, how far rounding to nearest would have been, and where the learnables ended.
//
// The error of a linear is ‖Ŷ − Y‖ / ‖Y‖, Y = W·X + b its full-precision output on what it is given
// in the full-precision block, Ŷ = Ŵ·Q(X) + b with its activation quantiser Q, if there is one. Of
// the outputs and not of the weights, since clipping gives up weights that X does not ask for; and
// each matrix by itself, the rest of the block being exact. Round-to-nearest acts on the untouched
// block, the committed matrix on the transformed one, whose function is the same. Without text the
// weights themselves are compared: ‖Ŵ − W‖ / ‖W‖.
#pragma once

#include "quant/calibrate.h"

namespace omq::quant {

// Bins of clip factors, and of log₂ of scales.
inline constexpr double kFactorBin = 1.0 / 256, kScaleBin = 1.0 / 16;

// The width is doubled until no more than `most` bins are needed. Throws Error when a value is not
// finite.
Histogram histogram(const std::vector<double>& values, double width, int64_t most = 256);

// Fills output_errors, linears and sites of `report`. x [1,T,D]: a sample of the block's inputs, or
// undefined; where it lies, all is computed. simulated: the committed block, dense. Takes about six
// forward passes of the sample.
void report_linears(const Recipe& recipe, const BlockMethod& method, const nn::Block& fp,
                    const nn::Block& simulated, const Tensor& x, const nn::Positions& at,
                    BlockReport& report);

}  // namespace omq::quant
