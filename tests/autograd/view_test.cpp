// Views: which elements they show, that they share the Storage, and what they refuse. Their
// gradients are checked in gradient_test.cpp.
#include <doctest/doctest.h>

#include "autograd/backward.h"
#include "autograd/ops.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq {
namespace {

using V = std::vector<double>;

Tensor counted(Shape shape) {
  V v(static_cast<size_t>(shape.product()));
  for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<double>(i);
  return Tensor::from<double>(v, shape);
}

}  // namespace

TEST_CASE("reshape keeps the row-major order, and copies only what is strided") {
  const Tensor x = counted({2, 6});
  CHECK(reshape(x, {3, 4}).storage() == x.storage());
  CHECK(reshape(x, {-1}).shape() == Dims{12});
  CHECK(reshape(x, {2, -1, 3}).shape() == Dims{2, 2, 3});
  const Tensor t = transpose(x, 0, 1), flat = reshape(t, {12});
  CHECK(flat.storage() != x.storage());
  CHECK(flat.to_vector<double>() == V{0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11});
  CHECK(reshape(Tensor::zeros({0, 3}), {-1, 3}).shape() == Dims{0, 3});
}

TEST_CASE("reshape refuses what does not fit") {
  const Tensor x = counted({2, 6});
  CHECK_THROWS_WITH_AS(reshape(x, {5}), "reshape: 12 elements of [2, 6] do not fit [5]", Error);
  CHECK_THROWS_WITH_AS(reshape(x, {-1, -1}), "reshape: two sizes of [-1, -1] are -1", Error);
  CHECK_THROWS_WITH_AS(reshape(x, {-1, 5}),
                       doctest::Contains("reshape: 12 elements of [2, 6] do not fit"), Error);
  CHECK_THROWS_WITH_AS(reshape(x, {-3, -4}), "reshape: negative size in [-3, -4]", Error);
}

TEST_CASE("transpose, slice, expand and contiguous") {
  const Tensor x = counted({2, 3});
  CHECK(transpose(x, 0, 1).to_vector<double>() == V{0, 3, 1, 4, 2, 5});
  CHECK(transpose(x, -1, -2).shape() == Dims{3, 2});
  CHECK(transpose(x, 0, 1).storage() == x.storage());
  CHECK(slice(x, 1, 1, 3).to_vector<double>() == V{1, 2, 4, 5});
  CHECK(slice(x, -2, 1, 2).to_vector<double>() == V{3, 4, 5});
  CHECK(slice(x, 0, 1, 1).numel() == 0);
  CHECK(expand(counted({2, 1}), {2, 3}).to_vector<double>() == V{0, 0, 0, 1, 1, 1});
  CHECK(contiguous(x).storage() == x.storage());
  CHECK(contiguous(transpose(x, 0, 1)).is_contiguous());
}

TEST_CASE("views refuse dims and ranges that do not exist") {
  const Tensor x = counted({2, 3});
  CHECK_THROWS_WITH_AS(transpose(x, 0, 2), "dim: index 2 out of range for shape [2, 3]", Error);
  CHECK_THROWS_WITH_AS(slice(x, 1, 2, 4), "slice: [2, 4) of dim 1 in shape [2, 3]", Error);
  CHECK_THROWS_WITH_AS(slice(x, 0, -1, 1), "slice: [-1, 1) of dim 0 in shape [2, 3]", Error);
  CHECK_THROWS_WITH_AS(slice(x, 0, 2, 1), "slice: [2, 1) of dim 0 in shape [2, 3]", Error);
  CHECK_THROWS_WITH_AS(slice(x, 2, 0, 1), "dim: index 2 out of range for shape [2, 3]", Error);
  CHECK_THROWS_WITH_AS(expand(x, {4, 3}), "expand: [2, 3] to [4, 3]", Error);
  CHECK_THROWS_WITH_AS(expand(x, {1, 2, 3}), "expand: [2, 3] to [1, 2, 3]", Error);
}

TEST_CASE("any stack of views shows the elements that indexing gives") {
  struct Stack {
    Tensor x;
    V want;
  };
  const auto stack = [](Rng& r) {
    Shape shape{r.between(1, 4), r.between(1, 4), r.between(1, 4)};
    Stack s{counted(shape), {}};
    std::vector<V> index;  // the same views on a table of element numbers
    s.want = s.x.to_vector<double>();
    for (int step = 0; step < 4; ++step) {
      const int a = static_cast<int>(r.between(0, 2)), b = static_cast<int>(r.between(0, 2));
      const int64_t begin = r.between(0, s.x.dim(a) - 1), end = r.between(begin + 1, s.x.dim(a));
      const bool cut = r.coin();
      const Shape before = s.x.shape();
      s.x = cut ? slice(s.x, a, begin, end) : transpose(s.x, a, b);
      V next;
      const Shape after = s.x.shape();
      for (int64_t i = 0; i < after[0]; ++i)
        for (int64_t j = 0; j < after[1]; ++j)
          for (int64_t k = 0; k < after[2]; ++k) {
            Dims at{i, j, k};
            if (cut)
              at[a] += begin;
            else
              std::swap(at[a], at[b]);
            next.push_back(
                s.want[static_cast<size_t>((at[0] * before[1] + at[1]) * before[2] + at[2])]);
          }
      s.want = next;
    }
    return s;
  };
  for_all(100, stack, [](const Stack& s) { CHECK(s.x.to_vector<double>() == s.want); });
}

TEST_CASE("a view of a view hands its gradient to the source once per element") {
  const Tensor x = parameter(counted({3, 4}));
  const Tensor row = slice(x, 0, 1, 2), again = slice(transpose(x, 0, 1), 1, 1, 2);
  const Gradients g = backward(sum(row) + sum(again) * 10.0);
  CHECK(g[x].to_vector<double>() == V{0, 0, 0, 0, 11, 11, 11, 11, 0, 0, 0, 0});
}

}  // namespace omq
