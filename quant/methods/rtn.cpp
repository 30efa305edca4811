// RTN: every weight to the nearest point of its group's min–max grid (and activations to that of
// their token's). The baseline of every table.
#include "quant/compose.h"

namespace omq::quant {

Recipe rtn(const Options& o) { return compose("rtn", {"none", "minmax", "nearest", "none"}, o); }

}  // namespace omq::quant
