// A row of results that one stage of decoding leaves prepared for the next, on every device that
// has such stages.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "tensor/decode_kernels.h"
#include "tensor/device.h"
#include "tensor/step_graph.h"
#include "tests/support/device_packed.h"

namespace omq {
namespace {

constexpr double kEps = 1e-5;

// Matrices of one form on the CPU and on the device.
struct Stage {
  std::vector<RowMatrix> cpu, device;
  RowOutput output;
  RowStage on_device() const { return {device, output}; }
};

Stage random_stage(Rng& rng, int64_t rows, int64_t cols, GroupSpec spec, RowOutput output,
                   Device d) {
  Stage s{{}, {}, output};
  const int count = output == RowOutput::Store ? 3 : output == RowOutput::Add ? 1 : 2;
  for (int i = 0; i < count; ++i) {
    const int64_t n = output == RowOutput::Store ? rows + 16 * i : rows;
    const Packed w = random_packed(rng, n, cols, spec, d);
    const Tensor bias = rng.coin() ? random_tensor(rng, {n}, DType::F32, -1, 1) : Tensor{};
    s.cpu.push_back({w.cpu, bias});
    s.device.push_back({w.device, bias.defined() ? uploaded(bias, d) : Tensor{}});
  }
  return s;
}

int64_t results_of(const Stage& s) {
  int64_t all = 0;
  for (const RowMatrix& m : s.cpu) all += std::get<PackedInt>(m.weight).rows;
  return s.output == RowOutput::SiluMul ? all / 2 : all;
}

// F32 that a stage must not look at.
Tensor unread(int64_t columns, Device d) { return Tensor::full({1, columns}, NAN, DType::F32, d); }

// Stages one behind another, the row between two prepared by the first of them, times the gain of a
// norm where that stands in front of the second: norms[i] is in front of stage i + 1. Results of
// every stage against the CPU's, from the stage's own F32 input.
void check_stages(Rng& rng, std::span<const Stage> stages, const std::vector<bool>& norms,
                  Device d) {
  const DecodeKernels& kernels = *decode_kernels(d);
  Tensor x = random_tensor(rng, {1, std::get<PackedInt>(stages[0].cpu[0].weight).cols}, DType::F32,
                           -2, 2),
         row, gain, device_gain;
  for (size_t i = 0; i < stages.size(); ++i) {
    CAPTURE(i);
    const Stage& s = stages[i];
    const int64_t N = results_of(s);
    const Tensor before = random_tensor(rng, {1, N}, DType::F32, -30, 30);
    Tensor want = converted(before, DType::F32), normed = x;
    if (gain.defined()) {
      normed = floats(x.shape());
      cpu::rms_norm(normed, x, gain, {}, kEps);
    }
    RowProducts(s.cpu, s.output, std::nullopt)(normed, want.data<float>());

    const bool more = i + 1 < stages.size();
    const int64_t bytes =
        more ? kernels.prepared_bytes(s.on_device(), stages[i + 1].on_device()) : 0;
    REQUIRE((bytes > 0 || !more));
    Guarded next({std::max<int64_t>(bytes, 1)}, DType::U8, d), y({1, N}, DType::F32, d);
    const std::vector<uint8_t> zeros(static_cast<size_t>(bytes));
    if (more) device_api(d).copy(next.tensor.raw(), d, zeros.data(), Device{}, zeros.size());
    on(y.tensor).copy(y.tensor, uploaded(before, d));
    const DecodeInput in{.x = row.defined() ? unread(x.dim(1), d) : uploaded(x, d),
                         .gain = device_gain,
                         .eps = gain.defined() ? kEps : 0.0,
                         .prepared = row};
    gain = more && norms[i] ? random_tensor(rng, {N}, DType::F32, 0.5, 1.5) : Tensor{};
    device_gain = gain.defined() ? uploaded(gain, d) : Tensor{};
    kernels.products(y.tensor, in, s.device, s.output,
                     more ? DecodeNext{next.tensor, device_gain, stages[i + 1].device}
                          : DecodeNext{.weights = stages[0].device});
    CHECK(close(y.tensor, want, 1e-7));
    CHECK(y.untouched());
    CHECK(next.untouched());
    x = converted(y.tensor, DType::F32);
    row = next.tensor;
  }
}

// Calls body(rng, device, whether on the kernels of the oldest supported devices) for every device
// with stages; first on the kernels that suit it.
template <class F> void on_stages(F&& body) {
  on_devices(1, [&](Rng& rng, Device d) {
    if (!decode_kernels(d)) return;
    bool oldest = false;
    on_both_paths(d, [&] {
      body(rng, d, oldest);
      oldest = true;
    });
  });
}

}  // namespace

TEST_CASE("devices: a row that a stage leaves prepared is multiplied by the next") {
  on_stages([](Rng& rng, Device d, bool oldest) {
    for (const int bits : {2, 3, 4})
      for (const int64_t group : {0, 32, 64, 128})
        for (const RowOutput output : {RowOutput::Add, RowOutput::SiluMul}) {
          CAPTURE(bits);
          CAPTURE(group);
          CAPTURE(static_cast<int>(output));
          const int64_t K = 32 * rng.between(1, 20), N = 32 * rng.between(1, 40);
          CAPTURE(K);
          CAPTURE(N);
          const GroupSpec spec{.bits = bits, .group_size = group};
          const Stage first = random_stage(rng, N, K, spec, output, d),
                      second = random_stage(
                          rng, 16 * rng.between(1, 6) + 3, N, spec,
                          output == RowOutput::Add ? RowOutput::Store : RowOutput::Add, d);
          // Spans of 512 columns need more shared memory than the oldest devices have.
          if (oldest && group % 128 == 0 &&
              decode_kernels(d)->prepared_bytes(first.on_device(), second.on_device()) == 0)
            continue;
          check_stages(rng, std::array{first, second}, {output == RowOutput::Add}, d);
        }
  });
}

TEST_CASE("devices: the stages of a layer hand their rows on") {
  on_stages([](Rng& rng, Device d, bool) {
    for (const int bits : {2, 3, 4}) {
      CAPTURE(bits);
      const GroupSpec spec{.bits = bits, .group_size = 64};
      const int64_t K = 64 * rng.between(1, 9), M = 64 * rng.between(1, 9);
      const auto stage = [&](int64_t rows, int64_t cols, RowOutput output) {
        return random_stage(rng, rows, cols, spec, output, d);
      };
      const std::array stages{stage(K, K, RowOutput::Add), stage(M, K, RowOutput::SiluMul),
                              stage(K, M, RowOutput::Add), stage(K, K, RowOutput::Store)};
      check_stages(rng, stages, {true, false, true}, d);
    }
  });
}

TEST_CASE("devices: prepared rows as wide as a large model's, and results by several rounds") {
  on_devices(1, [](Rng& rng, Device d) {
    if (!decode_kernels(d)) return;
    for (const int bits : {2, 3, 4}) {
      CAPTURE(bits);
      const GroupSpec spec{.bits = bits, .group_size = 128};
      const auto stage = [&](int64_t rows, int64_t cols, RowOutput output) {
        return random_stage(rng, rows, cols, spec, output, d);
      };
      const Stage gated = stage(11008, 256, RowOutput::SiluMul);
      const Stage down = stage(512, 11008, RowOutput::Add);
      if (decode_kernels(d)->prepared_bytes(gated.on_device(), down.on_device()) == 0) {
        MESSAGE("skipped: rings of " << bits << " bits do not fit the device's shared memory");
        continue;
      }
      check_stages(rng, std::array{gated, down}, {false}, d);
      // Squares of more than 4096 columns; 70B's widest row.
      check_stages(rng,
                   std::array{stage(8192, 128, RowOutput::Add), stage(64, 8192, RowOutput::Store)},
                   {true}, d);
      check_stages(
          rng, std::array{stage(28672, 128, RowOutput::SiluMul), stage(32, 28672, RowOutput::Add)},
          {false}, d);
      // More panels a block than a round has, leaving a row and taking one.
      check_stages(rng,
                   std::array{stage(70016, 64, RowOutput::Add), stage(32, 70016, RowOutput::Add)},
                   {true}, d);
      check_stages(rng,
                   std::array{stage(64, 64, RowOutput::Add), stage(40000, 64, RowOutput::Store)},
                   {true}, d);
      check_stages(rng,
                   std::array{stage(640, 64, RowOutput::Add), stage(40000, 640, RowOutput::SiluMul),
                              stage(32, 40000, RowOutput::Add)},
                   {true, false}, d);
      const auto fine = [&](int64_t rows, int64_t cols, RowOutput output) {
        return random_stage(rng, rows, cols, {.bits = bits, .group_size = 32}, output, d);
      };
      check_stages(rng,
                   std::array{fine(160, 64, RowOutput::Add), fine(40000, 160, RowOutput::SiluMul),
                              fine(32, 40000, RowOutput::Store)},
                   {true, false}, d);
    }
  });
}

TEST_CASE("devices: a stage's results are the same whatever it knows of the next one's weights") {
  on_stages([](Rng& rng, Device d, bool) {
    for (const int bits : {2, 3, 4, 8}) {
      CAPTURE(bits);
      const auto stage = [&](int64_t rows, int64_t cols, RowOutput output) {
        return random_stage(rng, rows, cols, {.bits = bits, .group_size = 32}, output, d);
      };
      const Stage s = stage(320, 192, RowOutput::Add), tiny = stage(16, 32, RowOutput::Add),
                  large = stage(3000, 4096, RowOutput::Store);
      std::vector<RowMatrix> many = large.device;
      many.insert(many.end(), large.device.begin(), large.device.end());
      many.push_back({Tensor::full({64, 64}, 1, DType::F16, d), {}});
      const std::vector<RowMatrix> dense = {many.back()};
      const Tensor x = uploaded(random_tensor(rng, {1, 192}, DType::F32, -2, 2), d);
      const auto results = [&](std::span<const RowMatrix> weights) {
        Tensor y = Tensor::full({1, 320}, 0.25, DType::F32, d);
        decode_kernels(d)->products(y, {.x = x}, s.device, s.output, {.weights = weights});
        return y.to_vector<float>();
      };
      const std::vector<float> want = results({});
      for (const auto& weights : {tiny.device, large.device, many, dense})
        CHECK(results(weights) == want);
      CHECK_THROWS_WITH_AS(results(large.cpu), doctest::Contains("not in the order of a GPU"),
                           Error);
    }
  });
}

TEST_CASE("devices: recorded stages that know the next ones' weights give the same every time") {
  on_stages([](Rng& rng, Device d, bool) {
    const auto stage = [&](int bits, int64_t rows, int64_t cols) {
      return random_stage(rng, rows, cols, {.bits = bits, .group_size = 32}, RowOutput::Add, d);
    };
    const Stage small = stage(2, 320, 192), wide = stage(3, 3000, 192),
                large = stage(4, 3000, 4096);
    const std::vector<RowMatrix> dense = {
        {uploaded(random_tensor(rng, {64, 192}, DType::F16, -1, 1), d), {}}};
    std::vector<RowMatrix> many = large.device;
    for (int i = 0; i < 3; ++i) many.insert(many.end(), wide.device.begin(), wide.device.end());
    const Tensor x = uploaded(random_tensor(rng, {1, 192}, DType::F32, -2, 2), d);
    std::vector<Tensor> y;
    for (const int64_t rows : {320, 3000, 320, 64, 320})
      y.push_back(Tensor::zeros({1, rows}, DType::F32, d));
    const auto product = [&](size_t i, std::span<const RowMatrix> matrices,
                             std::span<const RowMatrix> behind) {
      decode_kernels(d)->products(y[i], {.x = x}, matrices, RowOutput::Add, {.weights = behind});
    };
    // Behind dense weights nobody is listened to: their kernel leaves no room.
    StepGraph step(d, [&] {
      product(0, small.device, wide.device);
      product(1, wide.device, many);
      product(2, small.device, dense);
      product(3, dense, small.device);
      product(4, small.device, large.device);
    });
    std::vector<std::vector<float>> want;
    for (int run = 0; run < 6; ++run) {
      for (Tensor& each : y) {
        const std::vector<float> zeros(static_cast<size_t>(each.numel()), 0.0f);
        device_api(d).copy(each.raw(), d, zeros.data(), Device{}, each.nbytes());
      }
      step.run();
      for (size_t i = 0; i < y.size(); ++i) {
        CAPTURE(run);
        CAPTURE(i);
        const auto got = y[i].to_vector<float>();
        if (run == 0) want.push_back(got);
        CHECK(got == want[i]);
      }
    }
    for (const auto& each : want) CHECK(each != std::vector<float>(each.size(), 0.0f));
  });
}

TEST_CASE("devices: what is no number in a prepared row spoils the results behind it") {
  on_stages([](Rng& rng, Device d, bool) {
    const DecodeKernels& kernels = *decode_kernels(d);
    const GroupSpec spec{.bits = 2, .group_size = 64};
    const Stage first = random_stage(rng, 96, 64, spec, RowOutput::Add, d),
                second = random_stage(rng, 32, 96, spec, RowOutput::Add, d);
    const int64_t bytes = kernels.prepared_bytes(first.on_device(), second.on_device());
    REQUIRE(bytes > 0);
    for (const float bad : {INFINITY, NAN, 0.0f, 1e-42f}) {
      CAPTURE(bad);
      const bool finite = std::isfinite(bad);
      Tensor x = Tensor::full({1, 64}, 0.0, DType::F32), before = floats({1, 96});
      for (int64_t i = 0; i < 96; ++i) before.data<float>()[i] = finite ? bad : 1.0f;
      before.data<float>()[50] = bad;
      Tensor row = Tensor::zeros({bytes}, DType::U8, d), y = uploaded(before, d),
             got = Tensor::zeros({1, 32}, DType::F32, d);
      Stage plain = first;
      plain.device[0].bias = {};
      kernels.products(y, {.x = uploaded(x, d)}, plain.device, RowOutput::Add, {row, {}});
      // F32 that is finite: what is no number can only come from the row.
      const Tensor finite_x = Tensor::zeros({1, 96}, DType::F32, d);
      kernels.products(got, {.x = finite_x, .prepared = row}, second.device, RowOutput::Add, {});
      for (const double v : values(got)) CHECK(std::isfinite(v) == finite);
    }
  });
}

TEST_CASE("devices: rows are not prepared where a scale's columns stand in two blocks") {
  on_devices(1, [](Rng& rng, Device d) {
    if (!decode_kernels(d)) return;
    const DecodeKernels& kernels = *decode_kernels(d);
    const auto stage = [&](int64_t rows, int64_t cols, int bits) {
      return random_stage(rng, rows, cols, {.bits = bits, .group_size = 32}, RowOutput::Add, d);
    };
    const Stage odd = stage(48, 64, 2), even = stage(64, 64, 2), behind_odd = stage(32, 48, 2),
                behind = stage(32, 64, 2), wide = stage(32, 64, 8);
    CHECK(kernels.prepared_bytes(even.on_device(), behind.on_device()) > 0);
    CHECK(kernels.prepared_bytes({}, behind.on_device()) > 0);
    CHECK(kernels.prepared_bytes(odd.on_device(), behind_odd.on_device()) == 0);
    CHECK(kernels.prepared_bytes(even.on_device(), wide.on_device()) == 0);
    CHECK(kernels.prepared_bytes(wide.on_device(), behind.on_device()) == 0);
    // Its own row could not be F32.
    const Stage uneven = random_stage(rng, 64, 50, {.bits = 2}, RowOutput::Add, d);
    CHECK(kernels.prepared_bytes(uneven.on_device(), behind.on_device()) == 0);
    Tensor y = floats({1, 48}, d),
           row = Tensor::zeros({kernels.prepared_bytes({}, behind.on_device())}, DType::U8, d);
    CHECK_THROWS_AS(
        kernels.products(y, {.x = floats({1, 64}, d)}, odd.device, RowOutput::Add, {row, {}}),
        Error);
  });
}

}  // namespace omq
