// GPTQ (arXiv 2210.17323): min–max grids, codes solved one column after the other on the inputs of
// each matrix (round_gptq.cpp). Inputs are those of the quantised stream, and within a block those
// that the matrices before leave: q, k, v | o | gate, up | down ("true-sequential").
#include "quant/compose.h"

namespace omq::quant {

Recipe gptq(const Options& o) { return compose("gptq", {"none", "minmax", "gptq", "none"}, o); }

}  // namespace omq::quant
