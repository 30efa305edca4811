// Layers, quantisation, the optimiser and the memory table on every device present against the
// CPU's; see tests/support/device_compare.h for how.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "tests/support/device_compare.h"

namespace omq {

TEST_CASE("devices: softmax and its gradient") {
  on_devices(60, [](Rng& rng, Device d) {
    const Shape shape = some_rows(rng);
    Input x = float_input(rng, shape, d, -6, 6);
    const Input y = float_input(rng, shape, d, 0, 1), dy = float_input(rng, shape, d);
    const DType stored = some_float(rng, d);
    compare(
        d, {{shape, stored}}, {x}, 1e-12,
        [](const DenseKernels& k, Tensors& out, const Tensors& in) { k.softmax(out[0], in[0]); });
    compare(d, {{shape}}, {y, dy}, 1e-11,
            [](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.softmax_vjp(out[0], in[0], in[1]);
            });
  });
}

TEST_CASE("devices: rms_norm and its gradients") {
  on_devices(80, [](Rng& rng, Device d) {
    Shape shape = some_rows(rng);
    shape[shape.n - 1] += 2;  // a row of one or two is (nearly) all cancellation
    const Shape width{shape.back()};
    const Input x = float_input(rng, shape, d), dy = float_input(rng, shape, d),
                w = random_input(rng, width, d), b = random_input(rng, width, d);
    const bool gain = rng.coin(), shift = rng.coin();
    compare(d, {{shape, some_float(rng, d)}}, {x, w, b}, 1e-12,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.rms_norm(out[0], in[0], gain ? in[1] : Tensor{}, shift ? in[2] : Tensor{}, 1e-5);
            });
    const int64_t wanted = rng.between(1, 7);  // which of dx, dw, db
    compare(d, {{shape}, {width}, {width}}, {x, w, dy}, 1e-10,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              Tensor got[3];
              for (int i = 0; i < 3; ++i) {
                k.fill(out[static_cast<size_t>(i)], 0);
                if (wanted >> i & 1) got[i] = out[static_cast<size_t>(i)];
              }
              k.rms_norm_vjp(got[0], got[1], got[2], in[0], gain ? in[1] : Tensor{}, in[2], 1e-5);
            });
  });
}

TEST_CASE("devices: silu_mul and its gradients") {
  on_devices(50, [](Rng& rng, Device d) {
    const Shape shape = some_rows(rng);
    const Input gate = float_input(rng, shape, d, -8, 8), up = float_input(rng, shape, d),
                dy = float_input(rng, shape, d);
    compare(d, {{shape, some_float(rng, d)}}, {gate, up}, 1e-12,
            [](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.silu_mul(out[0], in[0], in[1]);
            });
    compare(d, {{shape, some_float(rng, d)}, {shape, some_float(rng, d)}}, {gate, up, dy}, 1e-12,
            [](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.silu_mul_vjp(out[0], out[1], in[0], in[1], in[2]);
            });
  });
}

TEST_CASE("devices: rope in both directions") {
  on_devices(50, [](Rng& rng, Device d) {
    const int64_t half = rng.coin() ? 8 * rng.between(1, 8) : rng.between(1, 9), table = 40;
    const Shape shape{rng.between(1, 3), rng.between(1, 9), rng.between(1, 5), 2 * half};
    const Input x = float_input(rng, shape, d), c = random_input(rng, {table, half}, d),
                s = random_input(rng, {table, half}, d), at = ids_input(rng, {shape[1]}, table, d);
    const bool inverse = rng.coin();
    compare(d, {{shape, some_float(rng, d)}}, {x, c, s, at}, 1e-13,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.rope(out[0], in[0], in[1], in[2], in[3], inverse);
            });
  });
}

TEST_CASE("devices: embedding and its gradient add rows in order") {
  on_devices(50, [](Rng& rng, Device d) {
    const int64_t words = rng.between(1, 30),
                  n = rng.coin() ? some_length(rng) : rng.between(1, 20),
                  count = rng.between(0, 60);
    const Input table = float_input(rng, {words, n}, d), ids = ids_input(rng, {count}, words, d),
                dy = random_input(rng, {count, n}, d, dense_or_shifted(rng));
    compare(d, {{{count, n}}}, {table, ids}, 0,
            [](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.embedding(out[0], in[0], in[1]);
            });
    compare(d, {{{words, n}}}, {ids, dy}, 0,
            [](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.embedding_vjp(out[0], in[0], in[1]);
            });
  });
}

TEST_CASE("devices: cross_entropy and its gradient") {
  // A sure guess has a loss of nearly nothing, and rounding is all that is left of it.
  const Unary away_from_zero{UnaryKind::Affine, 1, 20};
  on_devices(50, [&](Rng& rng, Device d) {
    const int64_t rows = rng.between(0, 20), n = some_length(rng);
    const Input logits = float_input(rng, {rows, n}, d, -9, 9),
                targets = ids_input(rng, {rows}, n, d, true), dloss = random_input(rng, {rows}, d);
    compare(d, {{{rows}}, {{rows}}}, {logits, targets}, 1e-13,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.cross_entropy(out[0], out[1], in[0], in[1]);
              for (Tensor& y : out) k.unary(y, y, away_from_zero);
            });
    Tensor loss = Tensor::empty({rows}, DType::F32), lse = empty_like(loss);
    cpu::cross_entropy(loss, lse, logits.dense, targets.dense);
    compare(d, {{{rows, n}}}, {logits, laid_out(rng, lse, d, Layout::Dense), targets, dloss}, 1e-13,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.cross_entropy_vjp(out[0], in[0], in[1], in[2], in[3]);
              k.unary(out[0], out[0], away_from_zero);
            });
  });
}

TEST_CASE("devices: fake quantisation by groups has the CPU's codes") {
  on_devices(100, [](Rng& rng, Device d) {
    const Shape shape{rng.between(1, 12), some_length(rng)};
    const int64_t sizes[] = {0, 8, 64, 128, 100, 5};
    const GroupSpec s{.bits = static_cast<int>(rng.between(2, 8)),
                      .group_size = sizes[rng.between(0, 5)],
                      .end_codes_learn = rng.coin()};
    const Shape grid{shape[0], s.groups(shape[1])};
    const Input x = random_input(rng, shape, d, dense_or_shifted(rng)),
                dy = random_input(rng, shape, d, dense_or_shifted(rng)),
                h = random_input(rng, grid, d, Layout::Dense, DType::F32, 0.01, 1);
    Tensor zeros = random_tensor(rng, grid, DType::F32, 0, s.max_code());
    for (int64_t i = 0; i < zeros.numel(); ++i)
      zeros.data<float>()[i] = std::nearbyint(zeros.data<float>()[i]);
    const Input z = laid_out(rng, zeros, d, Layout::Dense);
    compare(d, {{shape, some_float(rng, d)}, {shape, DType::U8}}, {x, h, z}, 0,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.fake_quant(out[0], in[0], in[1], in[2], s);
              k.quantize_codes(out[1], in[0], in[1], in[2], s);
            });
    const int64_t wanted = rng.between(1, 3);
    // A few groups may be all there is, and the sum of one may cancel.
    compare(d, {{shape}, {grid}}, {x, h, z, dy}, 1e-10,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              Tensor none;
              k.fill(out[0], 0);
              k.fill(out[1], 0);
              k.fake_quant_vjp(wanted & 1 ? out[0] : none, wanted & 2 ? out[1] : none, in[0], in[1],
                               in[2], in[3], s);
            });
  });
}

TEST_CASE("devices: the gradient of a matrix whose own extremes make its grid") {
  on_devices(60, [](Rng& rng, Device d) {
    const Shape shape{rng.between(1, 12), some_length(rng)};
    const int64_t sizes[] = {0, 8, 128, 100};
    const GroupSpec s{.bits = static_cast<int>(rng.between(2, 8)),
                      .group_size = sizes[rng.between(0, 3)],
                      .end_codes_learn = rng.coin()};
    const Shape grid{shape[0], s.groups(shape[1])};
    Tensor values = random_tensor(rng, shape, DType::F32, -3, 3);
    for (int64_t i = 0; i < values.numel(); ++i)  // ties; + 0: one zero, not two
      values.data<float>()[i] = std::round(values.data<float>()[i] * 4) / 4 + 0.0f;
    Tensor hi = Tensor::empty(grid, DType::F32), lo = empty_like(hi), scale = empty_like(hi),
           zero = empty_like(hi);
    const Tensor u = random_tensor(rng, grid, DType::F32), l = random_tensor(rng, grid, DType::F32);
    cpu::group_range(hi, lo, values, s);
    cpu::lwc_grid(scale, zero, u, l, hi, lo, s);
    std::vector<Input> in{laid_out(rng, values, d, dense_or_shifted(rng))};
    for (const Tensor& t : {scale, zero, hi, lo}) in.push_back(laid_out(rng, t, d, Layout::Dense));
    for (int i = 0; i < 2; ++i) in.push_back(random_input(rng, grid, d));
    in.push_back(random_input(rng, shape, d, dense_or_shifted(rng)));
    compare(d, {{shape}}, in, 1e-13, [&](const DenseKernels& k, Tensors& out, const Tensors& t) {
      k.fake_quant_range_vjp(out[0], t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], s);
    });
  });
}

TEST_CASE("devices: fake quantisation by rows has the CPU's codes") {
  on_devices(80, [](Rng& rng, Device d) {
    const Shape shape = some_rows(rng);
    const RowQuant s{.bits = static_cast<int>(rng.between(2, 8)),
                     .include_zero = rng.coin(),
                     .end_codes_learn = rng.coin(),
                     .clip = rng.coin() ? 1 : 0.9};
    const double lo = rng.coin() ? -3 : 1;
    const Input x = random_input(rng, shape, d, dense_or_shifted(rng), DType::F32, lo, 4),
                dy = random_input(rng, shape, d, dense_or_shifted(rng));
    compare(d, {{shape, some_float(rng, d)}}, {x}, 0,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.fake_quant_rows(out[0], in[0], s);
            });
    compare(d, {{shape}}, {x, dy}, 1e-10,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              k.fake_quant_rows_vjp(out[0], in[0], in[1], s);
            });
  });
}

TEST_CASE("devices: the grid of clipped ranges, and its gradient") {
  on_devices(40, [](Rng& rng, Device d) {
    const Shape shape{rng.between(1, 40), rng.between(1, 40)};
    const Input u = random_input(rng, shape, d), l = random_input(rng, shape, d),
                hi = random_input(rng, shape, d, Layout::Dense, DType::F32, 0, 2),
                lo = random_input(rng, shape, d, Layout::Dense, DType::F32, -2, 0),
                g = random_input(rng, shape, d);
    const GroupSpec s{.bits = static_cast<int>(rng.between(2, 8)), .include_zero = rng.coin()};
    compare(d, {{shape}}, {u, l, hi, lo}, 1e-12,
            [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              Tensor zero = empty_like(out[0]);
              k.lwc_grid(out[0], zero, in[0], in[1], in[2], in[3], s);
            });
    const bool all = rng.coin();
    compare(d, all ? std::vector<Out>(4, {shape}) : std::vector<Out>(2, {shape}), {u, l, hi, lo, g},
            1e-11, [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
              Tensor none;
              k.lwc_grid_vjp(out[0], out[1], all ? out[2] : none, all ? out[3] : none, in[0], in[1],
                             in[2], in[3], in[4], s);
            });
  });
}

TEST_CASE("devices: adamw") {
  on_devices(30, [](Rng& rng, Device d) {
    const Shape shape{some_length(rng)};
    const Input p = random_input(rng, shape, d), m = random_input(rng, shape, d),
                v = random_input(rng, shape, d, Layout::Dense, DType::F32, 0, 2),
                g = random_input(rng, shape, d, dense_or_shifted(rng));
    compare(d, {{shape}, {shape}, {shape}}, {p, m, v, g}, 1e-12,
            [](const DenseKernels& k, Tensors& out, const Tensors& in) {
              for (size_t i = 0; i < 3; ++i) k.copy(out[i], in[i]);
              const AdamWStep step{1e-2, 0.9, 0.999, 1e-8, 0.1, {RateShape::Cosine, 7, 0, 0.05}};
              const Device at = out[0].device();
              Tensor clock =
                  Tensor::zeros({4}, at.type == DeviceType::CPU ? DType::F64 : DType::F32, at);
              for (int i = 0; i < 3; ++i) k.adamw_tick(clock, {}, step);
              k.adamw(out[0], out[1], out[2], in[3], clock, step);
            });
  });
}

TEST_CASE("devices: sums have the same bits a hundred times") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    Rng rng(11);
    const int repeats = gpu(d) ? 100 : 2;
    const Shape shape{130, 1032}, width{1032}, grid{130, 9};
    const GroupSpec s{.bits = 3, .group_size = 128};
    const Input x = random_input(rng, shape, d), dy = random_input(rng, shape, d),
                w = random_input(rng, width, d), ids = ids_input(rng, {130}, 7, d),
                h = random_input(rng, grid, d, Layout::Dense, DType::F32, 0.1, 1),
                z = laid_out(rng, Tensor::full(grid, 3), d, Layout::Dense);
    compare(
        d,
        {{{1, 1}},
         {{1, 1032}},
         {{130, 1}},
         {shape},
         {width},
         {width},
         {grid},
         {{7, 1032}},
         {{130}},
         {{130}},
         {shape},
         {shape},
         {{130}},
         {width}},
        {x, dy, w, ids, h, z}, 1e-10,
        [&](const DenseKernels& k, Tensors& out, const Tensors& in) {
          Tensor none;
          for (size_t i = 0; i < 3; ++i) k.sum_to(out[i], in[0]);
          k.rms_norm_vjp(out[3], out[4], out[5], in[0], in[2], in[1], 1e-5);
          k.fake_quant_vjp(none, out[6], in[0], in[4], in[5], in[1], s);
          k.embedding_vjp(out[7], in[3], in[1]);
          k.cross_entropy(out[8], out[9], in[0], in[3]);
          k.softmax(out[10], in[0]);
          k.fake_quant_rows_vjp(out[11], in[0], in[1], {.bits = 4});
          k.scale_matrix_vjp(out[12], out[13], in[0], none, in[2], in[1]);
        },
        repeats);
  }
}

TEST_CASE("devices: an id, a position or a target outside gives NaN on a GPU, never a wild read") {
  for (Device d : test_devices()) {
    if (!gpu(d)) continue;
    CAPTURE(d);
    const Tensor table = Tensor::zeros({3, 8}, DType::F32, d),
                 wild = Tensor::from<int32_t>({1 << 30, 1, -5}, {3}, d);
    Tensor y = Tensor::empty({3, 8}, DType::F32, d), loss = Tensor::empty({3}, DType::F32, d),
           lse = empty_like(loss), dtable = empty_like(table);
    on(y).embedding(y, table, wild);
    on(y).cross_entropy(loss, lse, table, wild);
    on(y).embedding_vjp(dtable, wild, Tensor::full({3, 8}, 2, DType::F32, d));
    CHECK(std::isnan(values(y)[0]));
    CHECK(values(y)[8] == 0);
    CHECK(std::isnan(values(loss)[0]));
    CHECK(values(loss)[1] == doctest::Approx(std::log(8.0)));
    CHECK(values(dtable)[8] == 2);
    Tensor turned = Tensor::empty({1, 3, 1, 16}, DType::F32, d);
    on(y).rope(turned, Tensor::zeros(turned.shape(), DType::F32, d), table, table, wild, false);
    CHECK(std::isnan(values(turned)[0]));
    CHECK(values(turned)[16] == 0);
  }
}

TEST_CASE("devices: memory is counted, copies take any direction, F64 stays on the CPU") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    const DeviceApi& api = device_api(d);
    const size_t before = api.memory(d.index).now;
    {
      const Tensor a = Tensor::from<float>({1, 2, 3}, {3}, d);
      Tensor b = Tensor::empty({3}, DType::F32, d);
      api.copy(b.raw(), d, a.raw(), d, a.nbytes());
      CHECK(values(b)[2] == 3);
      CHECK(api.memory(d.index).now >= before + 24);
    }
    CHECK(api.memory(d.index).now == before);
    CHECK(api.memory(d.index).peak >= before + 24);
    api.reset_memory_peak(d.index);
    CHECK(api.memory(d.index).peak == before);
    if (!gpu(d)) continue;
    Tensor wide = Tensor::empty({3}, DType::F64, d);
    CHECK_THROWS_WITH_AS(on(wide).fill(wide, 1), "fill: F64 lives on the CPU only", Error);
    CHECK_THROWS_WITH_AS(Tensor::empty({int64_t{1} << 45}, DType::U8, d),
                         doctest::Contains("out of memory: 35184372088832 bytes wanted"), Error);
    CHECK_THROWS_WITH_AS(Tensor::empty({1}, DType::U8, {DeviceType::CUDA, 99}),
                         doctest::Contains("cuda:99: this machine has"), Error);
  }
}

}  // namespace omq
