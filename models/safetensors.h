// safetensors: a mapped reader that gives zero-copy tensors, and a streaming writer.
//
// The file is a u64 header length, that many bytes of JSON, and one run of tensor bytes without
// gaps. The reader trusts nothing and refuses everything the format forbids
// (spec/interop-formats.md §7). The writer needs the memory of one tensor: data goes to the file as
// it comes, the header is put in front at the end.
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

#include "models/atomic_dir.h"
#include "tensor/tensor.h"

namespace omq {

using Metadata = std::map<std::string, std::string>;

struct SafetensorsEntry {
  std::string name;
  std::string dtype;            // as the file spells it: "F32", "BF16", "I64", …
  std::optional<DType> type;    // empty: a dtype that Tensor does not have
  Shape shape;                  // at most six sizes
  uint64_t begin = 0, end = 0;  // bytes from the start of the data
};

// Bytes of a tensor; nothing for an unknown dtype, a negative size, or a product beyond 62 bits.
std::optional<uint64_t> safetensors_bytes(std::string_view dtype, const Shape& shape);

class SafetensorsFile {
 public:
  // Maps the file and reads its header. Throws Error naming the file and the fault.
  explicit SafetensorsFile(const std::filesystem::path& file);
  // The same of a file that is in memory; tensors are views of `bytes`. `name` stands for the path.
  SafetensorsFile(std::shared_ptr<Storage> bytes, const std::filesystem::path& name);

  const std::filesystem::path& path() const { return path_; }
  const Metadata& metadata() const { return metadata_; }
  const std::vector<SafetensorsEntry>& entries() const {
    return entries_;
  }  // in the order of their data
  // Null when there is no tensor of this name.
  const SafetensorsEntry* find(std::string_view name) const;
  // A read-only view of the mapped file (a copy when its bytes lie askew for their type). Throws
  // Error when the name is unknown or Tensor has no such dtype.
  Tensor get(std::string_view name) const;
  // Bytes from the start of the file to the data.
  uint64_t data_offset() const { return data_offset_; }

 private:
  void read();  // bytes_
  void read_header(std::string_view header, uint64_t data_bytes);

  std::filesystem::path path_;
  std::shared_ptr<Storage> bytes_;
  uint64_t data_offset_ = 0;
  Metadata metadata_;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, size_t, std::less<>> index_;
};

// Writes NAME.partial and renames it in finish(); without finish() nothing is left. The same
// tensors and metadata in the same order give the same bytes. Data starts at a multiple of 64, and
// so does every tensor as long as those before it have sizes that are multiples of 64 (the format
// forbids gaps, so keeping that up is the caller's order).
class SafetensorsWriter {
 public:
  // metadata: "format": "pt" is added unless given, since transformers insists on it.
  explicit SafetensorsWriter(std::filesystem::path file, Metadata metadata = {});

  // bytes: row-major, little-endian, exactly what shape and dtype need. Throws Error: name given
  // twice, wrong size, disk full. dtype as safetensors spells it.
  void add(const std::string& name, std::string_view dtype, const Shape& shape,
           std::span<const std::byte> bytes);
  // A contiguous CPU tensor.
  void add(const std::string& name, const Tensor& tensor);
  // Writes the header, flushes and renames.
  void finish();
  // Bytes of tensor data so far.
  uint64_t data_bytes() const { return data_bytes_; }

 private:
  std::string header() const;
  void move_data(uint64_t to);

  AtomicFile file_;
  Metadata metadata_;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, size_t, std::less<>> index_;
  uint64_t data_offset_ = 0, data_bytes_ = 0;
};

}  // namespace omq
