// Copies, scalar functions, sums and group ranges on every device present against the CPU's; see
// tests/support/device_compare.h for how.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "tests/support/device_compare.h"

namespace omq {

TEST_CASE("devices: copy of any strides and dtypes") {
  on_devices(150, [](Rng& rng, Device d) {
    const bool floats = rng.coin();
    const DType from = kStored[rng.between(0, floats ? 2 : 5)],
                to = kStored[rng.between(0, floats ? 2 : 5)];
    const int dims = static_cast<int>(rng.between(1, 5));
    const Shape shape = some_shape(rng, dims,
                                   dims == 1   ? 3000
                                   : dims == 2 ? 70
                                   : dims == 3 ? 20
                                               : 7);
    Tensor whole = Tensor::empty(shape, DType::I32);  // whole numbers that every type holds
    for (int64_t i = 0; i < whole.numel(); ++i)
      whole.data<int32_t>()[i] = static_cast<int32_t>(rng.between(0, 100));
    const Input x = laid_out(rng, converted(whole, from), d, any_layout(rng));
    compare(d, {{shape, to}}, {x}, 0,
            [](const DenseKernels& k, Tensors& out, const Tensors& in) { k.copy(out[0], in[0]); });
  });
}

TEST_CASE("devices: copy rounds to 16 bits half to even, and transposes tiles") {
  on_devices(40, [](Rng& rng, Device d) {
    const Shape shape{rng.between(1, 3), rng.between(16, 100), rng.between(16, 100)};
    const DType to = kStored[rng.between(0, 2)];
    Input x = random_input(rng, {shape[0], shape[2], shape[1]}, d, Layout::Dense,
                           kStored[rng.between(0, 2)], -100, 100);
    const Strides swapped{shape[1] * shape[2], 1, shape[1]};
    x.view = x.view.alias(shape, swapped);
    x.dense = x.dense.alias(shape, swapped);
    compare(d, {{shape, DType::F32}}, {x}, 0,
            [](const DenseKernels& k, Tensors& out, const Tensors& in) { k.copy(out[0], in[0]); });
    Tensor got = Tensor::empty(shape, to, d), want = Tensor::empty(shape, to);
    on(got).copy(got, x.view);
    cpu::copy(want, x.dense);
    REQUIRE(bit_equal(got, want));
  });
}

TEST_CASE("devices: fill and copy write strided outputs and nothing else") {
  on_devices(60, [](Rng& rng, Device d) {
    const Shape shape = some_shape(rng, 3, 12);
    const DType dtype = kStored[rng.between(0, 5)];
    const Input ground = random_input(rng, {4000}, d, Layout::Dense, dtype, 0, 100);
    const Input window = laid_out(rng, Tensor::zeros(shape, dtype), d, Layout::Strided);
    const Input x = random_input(rng, shape, d, any_layout(rng), dtype, 0, 100);
    Strides strides = window.view.strides();
    const int64_t offset = rng.between(0, 20);
    int64_t last = offset;
    for (int i = 0; i < 3; ++i) last += (shape[i] > 0 ? shape[i] - 1 : 0) * strides[i];
    if (last >= 4000) return;
    Tensor host = converted(ground.dense, dtype), device = uploaded(host, d);
    Tensor in_host = host.alias(shape, strides, offset),
           in_device = device.alias(shape, strides, offset);
    if (rng.coin()) {
      cpu::fill(in_host, 3);
      on(device).fill(in_device, 3);
    } else {
      cpu::copy(in_host, x.dense);
      on(device).copy(in_device, x.view);
    }
    REQUIRE(bit_equal(device, host));
  });
}

TEST_CASE("devices: scalar functions and their slopes") {
  const std::vector<Unary> functions = {{UnaryKind::Affine, 1.5, -0.25},
                                        {UnaryKind::Exp},
                                        {UnaryKind::Log},
                                        {UnaryKind::Sqrt},
                                        {UnaryKind::Square},
                                        {UnaryKind::Abs},
                                        {UnaryKind::Sigmoid},
                                        {UnaryKind::Silu},
                                        {UnaryKind::Clamp, -0.5, 0.75},
                                        {UnaryKind::Round},
                                        {UnaryKind::RoundSte}};
  for (const Unary& f : functions)
    on_devices(12, [&](Rng& rng, Device d) {
      CAPTURE(static_cast<int>(f.kind));
      const int dims = static_cast<int>(rng.between(0, 4));
      const Shape shape = some_shape(rng, dims, dims < 2 ? 2000 : dims == 2 ? 60 : 9);
      const bool positive = f.kind == UnaryKind::Log || f.kind == UnaryKind::Sqrt;
      const double lo = positive ? 0.01 : -5;
      const Input x = random_input(rng, shape, d, any_layout(rng), DType::F32, lo, 5);
      compare(d, {{shape}}, {x}, 1e-11,
              [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
                k.unary(out[0], in[0], f);
              });
      Tensor y = Tensor::empty(shape, DType::F32);
      cpu::unary(y, x.dense, f);
      const Input at = laid_out(rng, y, d, any_layout(rng)),
                  dy = random_input(rng, shape, d, any_layout(rng));
      compare(d, {{shape}}, {x, at, dy}, 1e-11,
              [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
                k.unary_vjp(out[0], in[0], in[1], in[2], f);
              });
    });
}

TEST_CASE("devices: broadcasting arithmetic and its slopes") {
  const Binary functions[] = {Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Max};
  for (Binary f : functions)
    on_devices(25, [&](Rng& rng, Device d) {
      CAPTURE(static_cast<int>(f));
      const int dims = static_cast<int>(rng.between(1, 4));
      const Shape shape = some_shape(rng, dims, dims < 2 ? 2000 : dims == 2 ? 60 : 9);
      const auto operand = [&] {  // some dims are repeated
        Shape small = shape;
        for (int i = 0; i < dims; ++i)
          if (rng.between(0, 2) == 0) small[i] = std::min<int64_t>(small[i], 1);
        Input x = random_input(rng, small, d, any_layout(rng), DType::F32, 0.5, 3);
        const auto spread = [&](const Tensor& t) {
          Strides s = t.strides();
          for (int i = 0; i < dims; ++i)
            if (small[i] != shape[i]) s[i] = 0;
          return t.alias(shape, s);
        };
        return Input{spread(x.dense), spread(x.view)};
      };
      const Input a = operand(), b = operand(), dy = random_input(rng, shape, d, any_layout(rng));
      compare(d, {{shape}}, {a, b}, 1e-13,
              [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
                k.binary(out[0], in[0], in[1], f);
              });
      const bool both = rng.coin();
      compare(d, {{shape}, {shape}}, {a, b, dy}, 1e-13,
              [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
                Tensor none;
                k.binary_vjp(out[0], out[1], in[0], in[1], in[2], f);
                if (!both) k.binary_vjp(none, out[1], in[0], in[1], in[2], f);
              });
    });
}

TEST_CASE("devices: sum_to of any dims") {
  on_devices(120, [](Rng& rng, Device d) {
    const int dims = static_cast<int>(rng.between(1, 4));
    const Shape shape = some_shape(rng, dims, dims == 1 ? 60000 : dims == 2 ? 300 : 14);
    Shape to = shape;
    for (int i = 0; i < dims; ++i)
      if (rng.coin()) to[i] = 1;
    const Input x = random_input(rng, shape, d, any_layout(rng), DType::F32, 0, 1);
    compare(d, {{to}}, {x}, 1e-13, [](const DenseKernels& k, Tensors& out, const Tensors& in) {
      k.sum_to(out[0], in[0]);
    });
  });
}

TEST_CASE("devices: group_range and its gradient") {
  on_devices(80, [](Rng& rng, Device d) {
    const Shape shape{rng.between(1, 12), some_length(rng)};
    const int64_t sizes[] = {0, 8, 64, 128, 100, 5};
    const GroupSpec s{.group_size = sizes[rng.between(0, 5)], .include_zero = rng.coin()};
    const Shape grid{shape[0], s.groups(shape[1])};
    Tensor values = random_tensor(rng, shape, DType::F32, -3, rng.coin() ? 3 : -1);
    for (int64_t i = 0; i < values.numel(); ++i)  // ties; + 0: one zero, not two
      values.data<float>()[i] = std::round(values.data<float>()[i] * 4) / 4 + 0.0f;
    const Input x = laid_out(rng, values, d, any_layout(rng)), dhi = random_input(rng, grid, d),
                dlo = random_input(rng, grid, d);
    compare(d, {{grid}, {grid}}, {x}, 0,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.group_range(out[0], out[1], in[0], s);
            });
    Tensor hi = Tensor::empty(grid, DType::F32), lo = empty_like(hi);
    cpu::group_range(hi, lo, x.dense, s);
    compare(d, {{shape}},
            {x, laid_out(rng, hi, d, Layout::Dense), laid_out(rng, lo, d, Layout::Dense), dhi, dlo},
            1e-13, [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.group_range_vjp(out[0], in[0], in[1], in[2], in[3], in[4], s);
            });
  });
}

TEST_CASE("devices: scale_matrix and the gradients of its scales") {
  on_devices(60, [](Rng& rng, Device d) {
    const Shape shape{rng.between(1, 70), some_length(rng)}, rows{shape[0]}, cols{shape[1]};
    const Input w = float_input(rng, shape, d), dy = float_input(rng, shape, d),
                r = random_input(rng, rows, d), c = random_input(rng, cols, d);
    const int64_t given = rng.between(1, 3), wanted = rng.between(1, 3);
    const auto if_given = [&](const Tensor& t, int64_t bit) { return given & bit ? t : Tensor{}; };
    compare(d, {{shape, some_float(rng, d)}}, {w, r, c}, 0,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.scale_matrix(out[0], in[0], if_given(in[1], 1), if_given(in[2], 2));
            });
    compare(d, {{rows}, {cols}}, {w, r, c, dy}, 1e-10,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              Tensor none;
              k.fill(out[0], 0);
              k.fill(out[1], 0);
              k.scale_matrix_vjp(wanted & 1 ? out[0] : none, wanted & 2 ? out[1] : none, in[0],
                                 if_given(in[1], 1), if_given(in[2], 2), in[3]);
            });
  });
}

}  // namespace omq
