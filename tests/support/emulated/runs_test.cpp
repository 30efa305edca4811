// That the emulated kernels are among those that the other tests of this program ask for.
#include <doctest/doctest.h>

#include <algorithm>
#include <string_view>

#include "tensor/isa.h"

namespace omq {

TEST_CASE("emulated: the kernels of AVX-512 and AMX run here") {
  const auto names = packed_isas_here();
  for (const std::string_view name : {"avx512", "amx"})
    CHECK(std::find(names.begin(), names.end(), name) != names.end());
}

}  // namespace omq
