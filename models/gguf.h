// GGUF, versions 2 and 3: a mapped reader of keys and tensors.
//
// Nothing is allocated on the word of the file: every count and length is checked against the bytes
// that are there, and strings and arrays stay in the mapping until somebody asks for them. Names
// and row order are the file's own; checkpoint_gguf.cpp turns them into Hugging Face's. Reference:
// spec/interop-formats.md §5.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/gguf_blocks.h"
#include "tensor/tensor.h"

namespace omq {

enum class GgufKind : uint32_t {
  U8,
  I8,
  U16,
  I16,
  U32,
  I32,
  F32,
  Bool,
  String,
  Array,
  U64,
  I64,
  F64
};
const char* gguf_kind_name(GgufKind kind);

// A key's value, still in the file's bytes.
struct GgufValue {
  GgufKind kind = GgufKind::U8;  // of the value, or of an array's elements
  bool array = false;
  uint64_t count = 1;              // elements of an array
  std::span<const uint8_t> bytes;  // of all elements; strings with their lengths
};

struct GgufTensor {
  std::string name;
  const GgmlType* type = nullptr;
  Shape shape;  // row-major: the file's sizes in reverse order
  std::span<const uint8_t> bytes;
};

class GgufFile {
 public:
  // Maps the file and reads keys and tensor infos. Throws Error naming the file and the fault.
  explicit GgufFile(const std::filesystem::path& file);
  // The same of a file that is in memory, which must outlive this. `name` stands for the path.
  GgufFile(std::shared_ptr<Storage> bytes, const std::filesystem::path& name);

  const std::filesystem::path& path() const { return path_; }
  uint32_t version() const { return version_; }
  const std::map<std::string, GgufValue, std::less<>>& values() const { return values_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in the file's order

  // Typed access to a key: nothing when it is absent, Error (file, key, both kinds) when it is of
  // another kind. Whole numbers of any width count as integer; integers do as real. An unsigned
  // value above 2⁶³−1 is an Error.
  std::optional<int64_t> integer(std::string_view key) const;
  std::optional<double> real(std::string_view key) const;
  std::optional<bool> boolean(std::string_view key) const;
  std::optional<std::string> text(std::string_view key) const;
  std::optional<std::vector<std::string>> texts(std::string_view key) const;
  std::optional<std::vector<int64_t>> integers(std::string_view key) const;
  std::optional<std::vector<float>> reals(std::string_view key) const;

  // Null when there is no tensor of this name.
  const GgufTensor* find(std::string_view name) const;
  // The tensor as F32: a view of the mapping when it is stored so and aligned, else decoded. Throws
  // Error naming the tensor and its type when that is not one of those decoded here.
  Tensor get_f32(std::string_view name) const;

 private:
  void read();  // bytes_
  const GgufValue* value(std::string_view key, bool array) const;

  std::filesystem::path path_;
  std::shared_ptr<Storage> bytes_;
  uint32_t version_ = 0;
  std::map<std::string, GgufValue, std::less<>> values_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
};

}  // namespace omq
