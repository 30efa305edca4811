// Tensor and Storage: shapes, views and their bounds, host access, files mapped into memory, and
// the count of bytes.
#include "tensor/tensor.h"

#include <doctest/doctest.h>

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "tensor/kernels.h"
#include "tensor/numeric.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"
#include "tests/support/property.h"

namespace omq {
namespace {

namespace fs = std::filesystem;

Tensor counted(Shape shape, Device device = {}) {  // 0, 1, 2, …
  std::vector<float> v(static_cast<size_t>(shape.product()));
  for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i);
  return Tensor::from<float>(v, shape, device);
}

struct TemporaryFile {
  fs::path path;
  explicit TemporaryFile(const std::string& text) {
    static int number = 0;
    path = fs::temp_directory_path() / fmt::format("omq-tensor-test-{}-{}", ::getpid(), number++);
    std::ofstream(path, std::ios::binary) << text;
  }
  ~TemporaryFile() {
    std::error_code ignored;
    fs::remove(path, ignored);
  }
};

}  // namespace

TEST_CASE("dims print, compare and multiply") {
  CHECK(to_string(Dims{2, 3, 4}) == "[2, 3, 4]");
  CHECK(to_string(Dims{}) == "[]");
  CHECK(Dims{2, 3}.product() == 6);
  CHECK(Dims{}.product() == 1);
  CHECK(Dims{2, 3} != Dims{2, 3, 1});
  CHECK(contiguous_strides({2, 3, 4}) == Dims{12, 4, 1});
  CHECK_THROWS_WITH_AS((Dims{1, 2, 3, 4, 5, 6, 7}), "Dims: more than 6 dimensions", Error);
}

TEST_CASE("sizes and names of dtypes") {
  CHECK(dtype_size(DType::F64) == 8);
  CHECK(dtype_size(DType::BF16) == 2);
  CHECK(dtype_size(DType::U8) == 1);
  CHECK(std::string(dtype_name(DType::BF16)) == "BF16");
  CHECK(std::string(dtype_name(dtype_of<int32_t>())) == "I32");
}

TEST_CASE("a tensor knows its shape, and a handle shares its bytes") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    const Tensor x = counted({2, 3, 4}, d);
    CHECK(x.numel() == 24);
    CHECK(x.nbytes() == 96);
    CHECK(x.dim(-1) == 4);
    CHECK(x.stride(0) == 12);
    CHECK(x.is_contiguous());
    CHECK(x.device() == d);
    CHECK_THROWS_WITH_AS(x.dim(3), "dim: index 3 out of range for shape [2, 3, 4]", Error);
    CHECK_THROWS_WITH_AS(x.stride(-4), "dim: index -4 out of range for shape [2, 3, 4]", Error);
    Tensor y = x;
    on(y).fill(y, 7);
    CHECK(x.to_vector<float>() == std::vector<float>(24, 7.0f));
    CHECK(x.detach().storage() == x.storage());
    CHECK(Tensor::full({}, 2.5, DType::F32, d).item<float>() == 2.5f);
    CHECK(Tensor::zeros({0, 3}, DType::F32, d).to_vector<float>().empty());
  }
}

TEST_CASE("views address the same elements") {
  const Tensor x = counted({3, 4});
  const Tensor t = x.alias({4, 3}, {1, 4});
  CHECK_FALSE(t.is_contiguous());
  CHECK(t.to_vector<float>() == std::vector<float>{0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11});
  const Tensor window = x.alias({2, 2}, {4, 1}, 5);
  CHECK(window.to_vector<float>() == std::vector<float>{5, 6, 9, 10});
  CHECK(window.alias({2}, {4}, 1).to_vector<float>() ==
        std::vector<float>{6, 10});  // offsets add up
  CHECK(x.alias({3}, {-4}, 8).to_vector<float>() == std::vector<float>{8, 4, 0});
  CHECK(x.alias({2, 3}, {0, 1}, 4).to_vector<float>() == std::vector<float>{4, 5, 6, 4, 5, 6});
  CHECK(x.alias({3, 1, 1}, {4, 99, 77}).is_contiguous() == false);
  CHECK(x.alias({1, 12}, {77, 1}).is_contiguous());
}

TEST_CASE("a view cannot leave its storage") {
  const Tensor x = counted({3, 4});
  CHECK_THROWS_WITH_AS(x.alias({13}, {1}),
                       "alias: shape [13] with strides [1] leaves its storage of 12", Error);
  CHECK_THROWS_AS(x.alias({2}, {1}, 11), Error);
  CHECK_THROWS_AS(x.alias({1}, {1}, -1), Error);
  CHECK_THROWS_AS(x.alias({3}, {-4}, 7), Error);
  CHECK_THROWS_AS(x.alias({3, 4}, {4, 2}), Error);
  CHECK_THROWS_WITH_AS(x.alias({3}, {1, 1}), "alias: 1 sizes, 2 strides", Error);
  CHECK_THROWS_WITH_AS(Tensor{}.alias({1}, {1}), "alias: undefined tensor", Error);
  CHECK_NOTHROW(x.alias({0, 100}, {4, 1}, 12));  // empty: touches nothing
  const Tensor part = x.alias({4}, {1}, 8);
  CHECK_THROWS_AS(part.alias({5}, {1}), Error);
  CHECK(part.alias({4}, {1}, -8).to_vector<float>() ==
        std::vector<float>{0, 1, 2, 3});  // within the storage
}

TEST_CASE("host access checks dtype and size") {
  const Tensor x = counted({2, 2});
  CHECK_THROWS_WITH_AS(x.data<int32_t>(), "tensor: holds F32, asked for I32", Error);
  CHECK_THROWS_WITH_AS(x.item<float>(), "item: shape [2, 2] has 4 elements", Error);
  CHECK_THROWS_WITH_AS(counted({1}).item<double>(), "item: holds F32, asked for F64", Error);
  CHECK_THROWS_WITH_AS(x.to_vector<double>(), "to_vector: holds F32, asked for F64", Error);
  CHECK_THROWS_WITH_AS(Tensor{}.raw(), "tensor: undefined", Error);
  CHECK_THROWS_WITH_AS(Tensor::from<float>({1, 2, 3}, {2, 2}), "from: 3 values for shape [2, 2]",
                       Error);
  CHECK_THROWS_WITH_AS(Tensor::empty({2, -1}, DType::F32), "empty: negative size in [2, -1]",
                       Error);
  const int64_t huge = int64_t{1} << 40;
  CHECK_THROWS_WITH_AS(Tensor::empty({huge, huge}, DType::F32),
                       "empty: [1099511627776, 1099511627776] is too large", Error);
  CHECK(x.alias({1}, {1}, 3).item<float>() == 3.0f);
}

#ifndef __SANITIZE_ADDRESS__  // its allocator stops the program instead
TEST_CASE("memory that cannot be had is an error, and is not counted") {
  const size_t before = cpu_memory_use().now;
  CHECK_THROWS_WITH_AS(Tensor::empty({int64_t{1} << 46}, DType::F64),
                       doctest::Contains("out of memory: 562949953421312 bytes wanted"), Error);
  CHECK(cpu_memory_use().now == before);
}

#endif

TEST_CASE("a device without a back end says what to do") {
  if (cuda_device_api()) return;
  CHECK_THROWS_WITH_AS(Tensor::empty({1}, DType::F32, {DeviceType::CUDA, 0}),
                       "device cuda:0 asked for, but this build has no CUDA back end; `make cuda` "
                       "makes one that has",
                       Error);
  static float byte;
  const Tensor x =
      Tensor::view(Storage::borrow(&byte, 4, {DeviceType::CUDA, 1}, nullptr), 0, {1}, DType::F32);
  CHECK_THROWS_WITH_AS(
      on(x),
      "tensor is on cuda:1 but this build has no CUDA back end; `make cuda` makes one that has",
      Error);
  CHECK_THROWS_AS(packed_on(x), Error);
  CHECK_THROWS_WITH_AS(on(Tensor{}), "kernel: undefined tensor", Error);
}

TEST_CASE("the count of live bytes follows allocation and release") {
  const MemoryUse before = cpu_memory_use();
  {
    const Tensor a = Tensor::empty({1000}, DType::F32);  // rounded up to 64 bytes
    CHECK(cpu_memory_use().now == before.now + 4032);
    const Tensor b = a.alias({10}, {1});
    CHECK(cpu_memory_use().now == before.now + 4032);
    reset_cpu_memory_peak();
    { const Tensor c = Tensor::empty({1 << 20}, DType::U8); }
    CHECK(cpu_memory_use().now == before.now + 4032);
    CHECK(cpu_memory_use().peak == before.now + 4032 + (1 << 20));
    reset_cpu_memory_peak();
    CHECK(cpu_memory_use().peak == cpu_memory_use().now);
  }
  CHECK(cpu_memory_use().now == before.now);
}

TEST_CASE("large blocks are used again, small and large are aligned") {
  void* first = nullptr;
  { first = Tensor::empty({1 << 18}, DType::F32).raw(); }
  const Tensor again = Tensor::empty({1 << 18}, DType::F32);
  CHECK(again.raw() == first);
  for (int64_t n : {1, 3, 100, 40'000})
    CHECK(reinterpret_cast<uintptr_t>(Tensor::empty({n}, DType::U8).raw()) % 64 == 0);
}

TEST_CASE("a piece of a file is a read-only tensor") {
  std::string bytes(10'000, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 7);
  const TemporaryFile file(bytes);
  const auto storage = Storage::map(file.path, 5000, 4000);  // neither end on a page border
  CHECK(storage->bytes() == 4000);
  CHECK_FALSE(storage->writable());
  const Tensor x = Tensor::view(storage, 100, {20}, DType::U8);
  for (size_t i = 0; i < 20; ++i)
    CHECK(x.data<uint8_t>()[i] == static_cast<uint8_t>((5100 + i) * 7));
  CHECK(Storage::map(file.path, 10'000, 0)->bytes() == 0);
  fs::remove(file.path);
  CHECK(x.data<uint8_t>()[0] == static_cast<uint8_t>(5100 * 7));  // the mapping outlives the name
}

TEST_CASE("files that are missing, short or no files are refused by name") {
  const TemporaryFile file("0123456789");
  const std::string name = file.path.string();
  CHECK_THROWS_WITH_AS(Storage::map(file.path, 4, 7),
                       (name + ": truncated: 7 bytes at offset 4 wanted, the file has 10").c_str(),
                       Error);
  CHECK_THROWS_AS(Storage::map(file.path, 11, 0), Error);
  CHECK_THROWS_AS(Storage::map(file.path, 1, std::numeric_limits<size_t>::max()),
                  Error);  // no wrap-around
  CHECK_THROWS_WITH_AS(Storage::map(name + ".no", 0, 1),
                       doctest::Contains(".no: cannot open: No such file"), Error);
  CHECK_THROWS_WITH_AS(Storage::map(fs::temp_directory_path(), 0, 1),
                       doctest::Contains("not a regular file"), Error);
}

TEST_CASE("a view of bytes stays inside them") {
  const auto storage = Storage::allocate(64, {});
  CHECK_NOTHROW(Tensor::view(storage, 0, {16}, DType::F32));
  CHECK_NOTHROW(Tensor::view(storage, 64, {0}, DType::F32));
  CHECK_THROWS_WITH_AS(Tensor::view(storage, 4, {16}, DType::F32),
                       "view: shape [16] of F32 at byte 4 does not fit in 64 bytes", Error);
  CHECK_THROWS_AS(Tensor::view(storage, 65, {0}, DType::F32), Error);
  CHECK_THROWS_WITH_AS(Tensor::view(storage, 0, {-1}, DType::F32), "view: negative size in [-1]",
                       Error);
  const int64_t wraps = int64_t{1} << 32;  // wraps² = 2⁶⁴, which is 0 in 64 bits
  CHECK_THROWS_AS(Tensor::view(storage, 0, {wraps, wraps}, DType::F32), Error);
}

TEST_CASE("borrowed memory keeps its owner alive") {
  auto owner = std::make_shared<std::vector<float>>(std::vector<float>{1, 2, 3});
  const std::weak_ptr<std::vector<float>> watch = owner;
  Tensor x = Tensor::view(Storage::borrow(owner->data(), 12, {}, owner), 0, {3}, DType::F32);
  owner.reset();
  CHECK_FALSE(watch.expired());
  CHECK(x.to_vector<float>() == std::vector<float>{1, 2, 3});
  x = {};
  CHECK(watch.expired());
}

TEST_CASE("errors carry the frames they passed") {
  const auto inner = [] { check(1 + 1 == 3, "sum: {} is not {}", 2, 3); };
  CHECK_THROWS_WITH_AS(with_context("adding", [&] { with_context("deeper", inner); }),
                       "while adding: while deeper: sum: 2 is not 3", Error);
  CHECK(with_context("fine", [] { return 4; }) == 4);
}

}  // namespace omq
