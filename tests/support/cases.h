// One line per differentiable op: which shapes, which inputs, which function. The gradient check
// (F64 against differences), the precision check (F32 against F64, on every device) and
// fused-against-composed all walk this list, so a new op is covered by adding a line here. Scalar
// functions come from the lists of tensor/elementwise.h instead; straight-through ops, which
// differences cannot check, are held by tests/autograd/ste_test.cpp.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "autograd/ops.h"
#include "tests/support/property.h"

namespace omq {

using Inputs = std::vector<Tensor>;

struct OpCase {
  std::string name;
  std::vector<Shape> shapes;  // of the inputs that are differentiated
  std::function<Tensor(const Inputs&)> f;
  std::function<Tensor(const Inputs&)> composed;  // the definition of a fused op, or empty
  double nmse = 1e-12;                            // of y and of the gradients: F32 against F64
  bool straight_through = false;  // its gradient is none of differences; ste_test.cpp has its form
};

// Inputs of a case in F64, uniform in [−1.5, 1.5].
inline Inputs case_inputs(const OpCase& c, uint64_t seed = 3) {
  Rng rng(seed);
  Inputs inputs;
  for (const Shape& shape : c.shapes)
    inputs.push_back(random_tensor(rng, shape, DType::F64, -1.5, 1.5));
  return inputs;
}

// A constant made on the CPU, in the type and on the device of x.
inline Tensor like(const Tensor& constant, const Tensor& x) {
  const bool integer = constant.dtype() == DType::I32;
  return converted(constant, integer ? DType::I32 : x.dtype(), x.device());
}

// cos and sin of position · 10000^(−2i/d): F64 [positions, d/2].
inline Tensor rope_table(int64_t positions, int64_t half, bool cosine) {
  Tensor t = Tensor::empty({positions, half}, DType::F64);
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(p) *
                           std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
      t.data<double>()[p * half + i] = cosine ? std::cos(angle) : std::sin(angle);
    }
  return t;
}

inline Tensor rope_at(const Tensor& x, const std::vector<int32_t>& at) {
  const int64_t half = x.dim(3) / 2;
  return rope(x, like(rope_table(16, half, true), x), like(rope_table(16, half, false), x),
              Tensor::from<int32_t>(at, {static_cast<int64_t>(at.size())}, x.device()));
}

inline std::vector<OpCase> view_cases() {
  return {
      {"reshape",
       {{2, 6}},
       [](const Inputs& in) {
         return reshape(in[0], {3, -1});
       },
       {}},
      {"transpose", {{2, 3, 4}}, [](const Inputs& in) { return transpose(in[0], 0, 2); }, {}},
      {"slice of a middle dim",
       {{2, 5, 3}},
       [](const Inputs& in) { return slice(in[0], 1, 1, 4); },
       {}},
      {"slice of the last dim",
       {{4, 5}},
       [](const Inputs& in) { return slice(in[0], -1, 2, 3); },
       {}},
      {"overlapping slices",
       {{6}},
       [](const Inputs& in) { return slice(in[0], 0, 0, 4) * slice(in[0], 0, 2, 6); },
       {}},
      {"expand",
       {{2, 1, 3, 1}},
       [](const Inputs& in) {
         return expand(in[0], {2, 4, 3, 2});
       },
       {}},
      {"contiguous",
       {{3, 4}},
       [](const Inputs& in) { return contiguous(transpose(in[0], 0, 1)); },
       {}},
      {"reshape of a transposed slice",
       {{4, 3, 5}},
       [](const Inputs& in) {
         return reshape(transpose(slice(in[0], 2, 1, 4), 0, 1), {9, 4});
       },
       {}},
      {"slice of an expanded view",
       {{3, 1}},
       [](const Inputs& in) {
         return square(slice(expand(in[0], {3, 6}), 1, 2, 5));
       },
       {}},
      {"transpose of an expanded view",
       {{1, 4}},
       [](const Inputs& in) {
         return square(transpose(expand(in[0], {3, 4}), 0, 1));
       },
       {}},
  };
}

inline std::vector<OpCase> reduction_cases() {
  const GroupSpec by_four{.group_size = 4}, official{.group_size = 4, .include_zero = false};
  return {
      {"sum", {{3, 4}}, [](const Inputs& in) { return sum(in[0]); }, {}},
      {"mean", {{2, 3, 2}}, [](const Inputs& in) { return mean(in[0]); }, {}},
      {"sum_to rows",
       {{3, 4}},
       [](const Inputs& in) {
         return sum_to(in[0], {3, 1});
       },
       {}},
      {"sum_to columns",
       {{3, 4}},
       [](const Inputs& in) {
         return sum_to(in[0], {1, 4});
       },
       {}},
      {"sum_to the middle",
       {{2, 3, 4, 2}},
       [](const Inputs& in) {
         return sum_to(in[0], {2, 1, 4, 1});
       },
       {}},
      {"sum_to itself",
       {{2, 3}},
       [](const Inputs& in) {
         return sum_to(in[0], {2, 3});
       },
       {}},
      {"mse",
       {{3, 4}, {3, 4}},
       [](const Inputs& in) { return mse(in[0], in[1]); },
       [](const Inputs& in) { return mse_composed(in[0], in[1]); }},
      // 10 columns by groups of 4: the last group is short
      {"lwc_grid",
       {{3, 5}, {3, 5}, {3, 5}, {3, 5}},
       [](const Inputs& in) {
         return lwc_grid(in[0], in[1], square(in[2]) + 0.1, -square(in[3]) - 0.1, {.bits = 3})
             .scale;
       },
       [](const Inputs& in) {
         return lwc_grid_composed(in[0], in[1], square(in[2]) + 0.1, -square(in[3]) - 0.1,
                                  {.bits = 3})
             .scale;
       }},
      {"scale_matrix",
       {{3, 10}, {3}, {10}},
       [](const Inputs& in) { return scale_matrix(in[0], in[1], in[2]); },
       [](const Inputs& in) { return scale_matrix_composed(in[0], in[1], in[2]); }},
      {"scale_matrix of columns",
       {{3, 8}, {8}},
       [](const Inputs& in) { return scale_matrix(in[0], {}, in[1]); },
       [](const Inputs& in) { return scale_matrix_composed(in[0], {}, in[1]); }},
      {"scale_matrix of rows",
       {{3, 8}, {3}},
       [](const Inputs& in) { return scale_matrix(in[0], in[1], {}); },
       [](const Inputs& in) { return scale_matrix_composed(in[0], in[1], {}); }},
      {"group_range above",
       {{3, 10}},
       [=](const Inputs& in) { return group_range(in[0], by_four).hi; },
       {}},
      {"group_range below",
       {{3, 10}},
       [=](const Inputs& in) { return group_range(in[0], by_four).lo; },
       {}},
      {"group_range of a row",
       {{3, 10}},
       [](const Inputs& in) {
         const Range r = group_range(in[0], GroupSpec{});
         return r.hi * 2.0 - r.lo * r.hi;
       },
       {}},
      {"group_range without zero",
       {{3, 10}},
       [=](const Inputs& in) {
         const Range r = group_range(square(in[0]) + 0.5, official);
         return r.hi - r.lo;
       },
       {}},
  };
}

// 1 above, or below, the diagonal: F64 [n, n].
inline Tensor triangle(int64_t n, bool upper) {
  Tensor t = Tensor::empty({n, n}, DType::F64);
  for (int64_t i = 0; i < n * n; ++i) t.data<double>()[i] = upper ? i % n > i / n : i % n < i / n;
  return t;
}

inline std::vector<OpCase> product_cases() {
  return {
      {"matmul", {{3, 4}, {4, 5}}, [](const Inputs& in) { return matmul(in[0], in[1]); }, {}},
      {"matmul in batches",
       {{2, 3, 2, 4}, {2, 3, 4, 3}},
       [](const Inputs& in) { return matmul(in[0], in[1]); },
       {}},
      {"matmul of transposed",
       {{4, 3}, {5, 4}},
       [](const Inputs& in) { return matmul(transpose(in[0], 0, 1), transpose(in[1], 0, 1)); },
       {}},
      {"matmul of transposed batches",
       {{2, 4, 3}, {2, 5, 4}},
       [](const Inputs& in) { return matmul(transpose(in[0], 1, 2), transpose(in[1], 1, 2)); },
       {}},
      {"unit_triangular_inverse",
       {{5, 5}},
       [](const Inputs& in) {
         return unit_triangular_inverse(in[0] * like(triangle(5, false), in[0]));
       },
       {}},
      {"unit_triangular_inverse of upper ones, in batches",
       {{2, 4, 4}},
       [](const Inputs& in) {
         return unit_triangular_inverse(in[0] * like(triangle(4, true), in[0]));
       },
       {}},
      {"matmul of a row",
       {{1, 4}, {4, 3}},
       [](const Inputs& in) { return matmul(in[0], in[1]); },
       {}},
      {"matmul of a column",
       {{3, 4}, {4, 1}},
       [](const Inputs& in) { return matmul(in[0], in[1]); },
       {}},
      {"matmul with one inner",
       {{3, 1}, {1, 4}},
       [](const Inputs& in) { return matmul(in[0], in[1]); },
       {}},
      {"matmul of expanded",
       {{1, 4}, {4, 1}},
       [](const Inputs& in) {
         return matmul(expand(in[0], {3, 4}), expand(in[1], {4, 2}));
       },
       {},
       1e-11},  // one sum of four products is all there is, and it may cancel
      {"matmul with itself",
       {{3, 3}},
       [](const Inputs& in) { return matmul(in[0], transpose(in[0], 0, 1)); },
       {}},
      {"linear",
       {{2, 3, 4}, {5, 4}},
       [](const Inputs& in) { return linear(in[0], in[1]); },
       [](const Inputs& in) {
         return reshape(matmul(reshape(in[0], {6, 4}), transpose(in[1], 0, 1)), {2, 3, 5});
       }},
      {"linear with bias",
       {{2, 3, 4}, {5, 4}, {5}},
       [](const Inputs& in) { return linear(in[0], in[1], in[2]); },
       {}},
      {"linear of a vector",
       {{4}, {5, 4}, {5}},
       [](const Inputs& in) { return linear(in[0], in[1], in[2]); },
       {}},
  };
}

inline std::vector<OpCase> layer_cases() {
  return {
      {"softmax",
       {{3, 2, 5}},
       [](const Inputs& in) { return softmax(in[0] * 3.0); },
       [](const Inputs& in) {
         const Tensor e = exp(in[0] * 3.0);
         return e / sum_to(e, {3, 2, 1});
       }},
      {"rms_norm, bare",
       {{2, 3, 6}},
       [](const Inputs& in) { return rms_norm(in[0], {}, {}, 1e-5); },
       [](const Inputs& in) { return rms_norm_composed(in[0], {}, {}, 1e-5); }},
      {"rms_norm",
       {{2, 3, 6}, {6}},
       [](const Inputs& in) { return rms_norm(in[0], in[1], {}, 1e-5); },
       [](const Inputs& in) { return rms_norm_composed(in[0], in[1], {}, 1e-5); }},
      {"rms_norm with a bias",
       {{4, 6}, {6}, {6}},
       [](const Inputs& in) { return rms_norm(in[0], in[1], in[2], 1e-2); },
       [](const Inputs& in) { return rms_norm_composed(in[0], in[1], in[2], 1e-2); }},
      {"rms_norm with an expanded weight",
       {{4, 6}, {1}},
       [](const Inputs& in) { return rms_norm(in[0], expand(in[1], {6}), {}, 1e-5); },
       [](const Inputs& in) { return rms_norm_composed(in[0], expand(in[1], {6}), {}, 1e-5); }},
      {"silu_mul",
       {{3, 5}, {3, 5}},
       [](const Inputs& in) { return silu_mul(in[0] * 3.0, in[1]); },
       [](const Inputs& in) { return silu(in[0] * 3.0) * in[1]; }},
      {"rope",
       {{2, 3, 2, 6}},
       [](const Inputs& in) {
         return rope_at(in[0], {5, 0, 11});
       },
       [](const Inputs& in) {  // two halves, turned by hand
         const Tensor& x = in[0];
         const Tensor a = slice(x, 3, 0, 3), b = slice(x, 3, 3, 6);
         auto table = [&](bool cosine) {
           const Tensor t = rope_table(16, 3, cosine);
           Tensor rows = Tensor::empty({1, 3, 1, 3}, DType::F64);
           const int64_t at[] = {5, 0, 11};
           for (int64_t i = 0; i < 9; ++i)
             rows.data<double>()[i] = t.data<double>()[at[i / 3] * 3 + i % 3];
           return like(rows, x);
         };
         const Tensor c = table(true), s = table(false);
         Tensor whole = Tensor::zeros({6, 6}, DType::F64),
                other = Tensor::zeros({6, 6}, DType::F64);
         for (int64_t i = 0; i < 3; ++i) {
           whole.data<double>()[i * 6 + i] = 1;
           other.data<double>()[i * 6 + 3 + i] = 1;
         }
         auto place = [&](const Tensor& half, const Tensor& where) {
           return linear(half, transpose(slice(like(where, x), 0, 0, 3), 0, 1));
         };
         return place(a * c - b * s, whole) + place(b * c + a * s, other);
       }},
      {"embedding",
       {{5, 3}},
       [](const Inputs& in) {
         return embedding(in[0], like(Tensor::from<int32_t>({4, 0, 4, 2, 0, 4}, {2, 3}), in[0]));
       },
       {}},
      {"cross_entropy",
       {{4, 6}},
       [](const Inputs& in) {
         return cross_entropy(in[0] * 2.0, like(Tensor::from<int32_t>({5, -1, 0, 2}, {4}), in[0]));
       },
       [](const Inputs& in) {  // −log softmax, picked by a table of ones
         Tensor pick = Tensor::zeros({4, 6}, DType::F64);
         pick.data<double>()[5] = pick.data<double>()[12] = pick.data<double>()[20] = -1;
         return reshape(sum_to(log(softmax(in[0] * 2.0)) * like(pick, in[0]), {4, 1}), {4});
       }},
      {"a gated half-block",
       {{2, 3, 4}, {4}, {6, 4}, {6, 4}, {4, 6}},
       [](const Inputs& in) {
         const Tensor h = rms_norm(in[0], in[1], {}, 1e-5);
         return in[0] + linear(silu_mul(linear(h, in[2]), linear(h, in[3])), in[4]);
       },
       {}},
  };
}

inline OpCase attention_case(const std::string& name, Shape q, Shape k, bool causal) {
  const AttentionSpec spec{.scale = 0.7, .causal = causal};
  return {name,
          {q, k, k},
          [spec](const Inputs& in) { return attention(in[0], in[1], in[2], spec); },
          [spec](const Inputs& in) { return attention_composed(in[0], in[1], in[2], spec); }};
}

inline std::vector<OpCase> attention_cases() {
  return {
      attention_case("attention", {2, 4, 2, 3}, {2, 4, 2, 3}, true),
      attention_case("attention with grouped queries", {1, 3, 6, 2}, {1, 3, 2, 2}, true),
      attention_case("attention over cached keys", {2, 2, 4, 2}, {2, 5, 2, 2}, true),
      attention_case("attention of one token", {1, 1, 4, 2}, {1, 6, 2, 2}, true),
      attention_case("attention that looks ahead", {1, 3, 2, 4}, {1, 4, 1, 4}, false),
      attention_case("attention of ten tokens", {1, 10, 2, 2}, {1, 10, 1, 2}, true),
  };
}

inline std::vector<OpCase> straight_through_cases() {
  const auto rows = [](const std::string& name, Shape shape, RowQuant s, double shift) -> OpCase {
    return {
        .name = name,
        .shapes = {shape},
        .f = [=](const Inputs& in) { return fake_quant_rows(in[0] + shift, s); },
        .composed = [=](const Inputs& in) { return fake_quant_rows_composed(in[0] + shift, s); },
        .straight_through = true};
  };
  return {
      rows("fake_quant_rows at 4 bits", {2, 3, 20}, {.bits = 4}, 0),
      rows("fake_quant_rows of heads at 8 bits", {2, 3, 2, 9}, {.bits = 8}, 0),
      rows("fake_quant_rows above zero", {4, 11}, {.bits = 6}, 4),
      rows("fake_quant_rows of a share of the range", {3, 23}, {.bits = 4, .clip = 0.8}, 0),
      rows("fake_quant_rows of one element", {5, 1}, {.bits = 3}, 0),
      rows("fake_quant_rows, official range", {4, 11}, {.bits = 4, .include_zero = false}, 2),
      rows("fake_quant_rows, end codes learn", {4, 17}, {.bits = 2, .end_codes_learn = true}, 0),
  };
}

inline std::vector<OpCase> op_cases() {
  std::vector<OpCase> all;
  for (auto list : {view_cases(), reduction_cases(), product_cases(), layer_cases(),
                    attention_cases(), straight_through_cases()})
    all.insert(all.end(), list.begin(), list.end());
  return all;
}

}  // namespace omq
