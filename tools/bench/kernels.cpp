// Benchmark of the packed kernels: decoding (one row of x) as a share of read bandwidth, prefill
// (many rows) in Gop/s.
//
// Decoding walks a set of equal matrices larger than the caches, so that every weight comes from
// memory, as in a model. A packed matrix meets activations as they are (A16) and as codes (A8, in
// integers; their quantisation counts). These and the bandwidth are measured in turn, pass by pass,
// because shared machines drift; medians are shown.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "tensor/bandwidth.h"
#include "tensor/isa.h"
#include "tensor/kernels.h"
#include "tensor/numeric.h"
#include "tensor/parallel.h"

namespace omq {
namespace {

struct Settings {
  std::vector<int> threads = {1, 2}, widths = {2, 3, 4, 8};
  int64_t rows_of_x = 512;  // in prefill
  int64_t group = 128;
  int act_bits = 8;  // of activations as codes
  int passes = 11;
  size_t set_mib = 256;  // of weights that decoding walks; small: what the loops do without memory
  bool decode_only = false;
};

struct MatrixShape {
  int64_t rows, cols;
};
constexpr MatrixShape kShapes[] = {{576, 576},   {1536, 576},  {576, 1536},
                                   {2048, 2048}, {2048, 5632}, {5632, 2048}};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<int64_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

double seconds_of(auto&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

PackedInt random_matrix(MatrixShape shape, int bits, int64_t group) {
  std::mt19937 rng(1);
  const GroupSpec spec{.bits = bits, .group_size = group};
  Tensor codes = Tensor::empty({shape.rows, shape.cols}, DType::U8);
  for (int64_t i = 0; i < codes.numel(); ++i)
    codes.data<uint8_t>()[i] = static_cast<uint8_t>(rng() % (1u << bits));
  const Shape grid{shape.rows, spec.groups(shape.cols)};
  return pack_codes(codes, Tensor::full(grid, 0x1p-8), Tensor::full(grid, 1 << (bits - 1)), spec);
}

// Copies of one matrix, in one piece of memory larger than the caches.
std::vector<PackedInt> matrix_set(const PackedInt& one, size_t set_bytes) {
  const size_t stride = (one.data.nbytes() + 63) / 64 * 64;
  const size_t count = std::max<size_t>(1, set_bytes / stride);
  auto storage = Storage::allocate(stride * count, Device{});
  std::vector<PackedInt> set(count, one);
  for (size_t i = 0; i < count; ++i) {
    set[i].data = Tensor::view(storage, i * stride, one.data.shape(), DType::U8);
    std::memcpy(set[i].data.raw(), one.data.raw(), one.data.nbytes());
  }
  return set;
}

Tensor random_rows(int64_t m, int64_t k) {
  std::mt19937 rng(2);
  std::normal_distribution<float> normal;
  Tensor x = Tensor::empty({m, k}, DType::F32);
  for (int64_t i = 0; i < m * k; ++i) x.data<float>()[i] = normal(rng);
  return x;
}

// One way to multiply, measured in turn with the others.
struct Contender {
  std::string name;
  std::function<void()> pass;
};

// Seconds of every contender, pass by pass in turn; `between` comes after each.
std::vector<std::vector<double>> race(const std::vector<Contender>& all, int passes,
                                      bool warm_each_time, const std::function<void()>& between) {
  std::vector<std::vector<double>> times(all.size());
  for (const Contender& c : all) c.pass();
  for (int i = 0; i < passes; ++i)
    for (size_t c = 0; c < all.size(); ++c) {
      if (warm_each_time) all[c].pass();
      times[c].push_back(seconds_of(all[c].pass));
      between();
    }
  return times;
}

std::string threads_text(int threads) {
  return fmt::format("{} thread{}", threads, threads == 1 ? " " : "s");
}

void decode_rows(const std::vector<Contender>& all, MatrixShape shape, size_t set_bytes,
                 size_t matrices, const Settings& s, ReadBandwidth& bandwidth) {
  for (int threads : s.threads) {
    set_num_threads(threads);
    std::vector<double> peak;
    // A small set is meant to lie in the cache, which the bandwidth's pass empties.
    const auto times =
        race(all, s.passes, s.set_mib < 16, [&] { peak.push_back(bandwidth.pass()); });
    for (size_t c = 0; c < all.size(); ++c) {
      const double seconds = median(times[c]), rate = static_cast<double>(set_bytes) / seconds;
      fmt::print(
          "decode   {:>5} {:>5}x{:<5} {}  {:8.1f} us  {:6.2f} GB/s  {:4.0f} % of {:.1f} GB/s\n",
          all[c].name, shape.rows, shape.cols, threads_text(threads),
          1e6 * seconds / static_cast<double>(matrices), 1e-9 * rate, 100 * rate / median(peak),
          1e-9 * median(peak));
    }
    std::fflush(stdout);
  }
}

void prefill_rows(const std::vector<Contender>& all, MatrixShape shape, const Settings& s) {
  for (int threads : s.threads) {
    set_num_threads(threads);
    const auto times = race(all, 5, false, [] {});
    const double ops = 2.0 * static_cast<double>(s.rows_of_x * shape.rows * shape.cols);
    for (size_t c = 0; c < all.size(); ++c)
      fmt::print("prefill  {:>5} {:>5}x{:<5} {}  {:8.2f} ms  {:6.0f} Gop/s  ({} rows)\n",
                 all[c].name, shape.rows, shape.cols, threads_text(threads), 1e3 * median(times[c]),
                 1e-9 * ops / median(times[c]), s.rows_of_x);
    std::fflush(stdout);
  }
}

QuantizedRows empty_codes(const Tensor& x, int bits) {
  return {.codes = Tensor::empty(x.shape(), DType::U8),
          .grid = Tensor::empty({x.dim(0), 2}, DType::F32),
          .spec = {.bits = bits},
          .cols = x.dim(1)};
}

void bench_packed(MatrixShape shape, int bits, const Settings& s, ReadBandwidth& bandwidth) {
  const PackedInt w = random_matrix(shape, bits, s.group);
  const std::string a16 = fmt::format("W{}", bits), codes = fmt::format("W{}A{}", bits, s.act_bits);
  {
    const std::vector<PackedInt> set = matrix_set(w, s.set_mib << 20);
    const Tensor x = random_rows(1, shape.cols);
    QuantizedRows q = empty_codes(x, s.act_bits);
    Tensor y = Tensor::empty({1, shape.rows}, DType::F32);
    const auto floats = [&] {
      for (const PackedInt& one : set) cpu::packed_matmul(y, x, one);
    };
    const auto integers = [&] {
      for (const PackedInt& one : set) {
        cpu::quantize_rows(q, x);
        cpu::packed_matmul_rows(y, q, one);
      }
    };
    decode_rows({{a16, floats}, {codes, integers}}, shape, set.size() * w.data.nbytes(), set.size(),
                s, bandwidth);
  }
  if (s.decode_only) return;
  const Tensor x = random_rows(s.rows_of_x, shape.cols);
  QuantizedRows q = empty_codes(x, s.act_bits);
  Tensor y = Tensor::empty({s.rows_of_x, shape.rows}, DType::F32);
  const auto integers = [&] {
    cpu::quantize_rows(q, x);
    cpu::packed_matmul_rows(y, q, w);
  };
  prefill_rows({{a16, [&] { cpu::packed_matmul(y, x, w); }}, {codes, integers}}, shape, s);
}

void bench_dense(MatrixShape shape, DType dtype, const Settings& s, ReadBandwidth& bandwidth) {
  const size_t bytes = static_cast<size_t>(shape.rows * shape.cols) * dtype_size(dtype);
  const size_t count = std::max<size_t>(1, (s.set_mib << 20) / bytes);
  auto storage = Storage::allocate(bytes * count, Device{});
  std::memset(storage->data(), 0x11, bytes * count);  // small numbers in every format
  std::vector<Tensor> set;
  for (size_t i = 0; i < count; ++i)
    set.push_back(Tensor::view(storage, i * bytes, {shape.rows, shape.cols}, dtype));
  const Tensor x = random_rows(1, shape.cols);
  Tensor y = Tensor::empty({1, shape.rows}, DType::F32);
  const auto decode = [&] {
    for (const Tensor& one : set) cpu::dense_matmul(y, x, one);
  };
  decode_rows({{dtype_name(dtype), decode}}, shape, bytes * count, count, s, bandwidth);
  if (s.decode_only) return;
  const Tensor xs = random_rows(s.rows_of_x, shape.cols);
  Tensor ys = Tensor::empty({s.rows_of_x, shape.rows}, DType::F32);
  prefill_rows({{dtype_name(dtype), [&] { cpu::dense_matmul(ys, xs, set[0]); }}}, shape, s);
}

int run(int argc, char** argv) {
  CLI::App app{"Packed and dense matrix products against this machine's read bandwidth"};
  Settings s;
  std::string isa, only;
  app.add_option("--threads", s.threads, "Numbers of threads")->delimiter(',');
  app.add_option("--bits", s.widths, "Code widths; none: dense only")->delimiter(',');
  app.add_option("--group", s.group, "Columns that share a scale; 0: the row");
  app.add_option("--abits", s.act_bits, "Bits of activations as codes, 2 to 8");
  app.add_option("--rows", s.rows_of_x, "Rows of x in prefill");
  app.add_option("--passes", s.passes, "Passes over a set; the median counts");
  app.add_option("--set-mib", s.set_mib,
                 "Size of a decoding set; below the caches' size: no memory");
  app.add_option("--isa", isa, "Instruction set: amx, avx512, avx2, neon or scalar");
  app.add_option("--shape", only, "One shape only, as 2048x5632");
  app.add_flag("--decode-only", s.decode_only, "Leave prefill out");
  CLI11_PARSE(app, argc, argv);
  check(s.act_bits >= 2 && s.act_bits <= 8, "--abits {}: 2 to 8", s.act_bits);
  check(isa.empty() || force_packed_isa(isa), "--isa {}: not on this machine", isa);

  fmt::print("instruction set {}, groups of {}, sets of {} MiB; rows x columns of w\n",
             packed_isa_name(), s.group, s.set_mib);
  ReadBandwidth bandwidth;
  for (MatrixShape shape : kShapes) {
    if (!only.empty() && only != fmt::format("{}x{}", shape.rows, shape.cols)) continue;
    for (int bits : s.widths) bench_packed(shape, bits, s, bandwidth);
    for (DType dtype : {DType::BF16, DType::F16, DType::F32})
      bench_dense(shape, dtype, s, bandwidth);
  }
  return 0;
}

}  // namespace
}  // namespace omq

int main(int argc, char** argv) {
  try {
    return omq::run(argc, argv);
  } catch (const omq::Error& e) {
    fmt::print(stderr, "omq-bench-kernels: {}\n", e.what());
    return 1;
  }
}
