// straight_through and repeat_groups: what quantisers with free grids are made of.
#include <doctest/doctest.h>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq {

TEST_CASE("straight_through is the value with the gradient of x; repeat_groups goes by columns") {
  const Tensor x = parameter(Tensor::from<float>({0.2f, 1.7f}, {1, 2})),
               value = Tensor::from<float>({5, 7}, {1, 2}),
               up = Tensor::from<float>({2, 3}, {1, 2});
  const Tensor y = straight_through(x, value);
  CHECK(bit_equal(y.detach(), value));
  CHECK(bit_equal(backward(sum(y * up))[x], up));
  CHECK_THROWS_WITH_AS(straight_through(x, Tensor::zeros({2})),
                       doctest::Contains("straight_through: "), Error);

  const GroupSpec s{.group_size = 2};
  const Tensor wide = repeat_groups(x, 3, s);
  CHECK(wide.to_vector<float>() == std::vector<float>{0.2f, 0.2f, 1.7f});
  CHECK(backward(sum(wide))[x].to_vector<float>() == std::vector<float>{2, 1});
  CHECK_THROWS_WITH_AS(repeat_groups(x, 5, s), doctest::Contains("5 columns are 3 groups"), Error);
}

}  // namespace omq
