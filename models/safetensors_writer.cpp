// The safetensors writer. The header's size is known only at the end, so room is left for it in
// front of the data; when the guess is too small, or too generous for a small file, the data moves
// once.
#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "models/safetensors.h"
#include "tensor/error.h"

namespace omq {

namespace {

constexpr uint64_t kAlign = 64;

uint64_t align_up(uint64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

std::string json_text(std::string_view text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    fail("safetensors header: a name or metadata value is not valid UTF-8");
  }
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(std::filesystem::path file, Metadata metadata)
    : file_(std::move(file)), metadata_(std::move(metadata)) {
  metadata_.try_emplace("format", "pt");
  // 128 KiB hold the entries of about a thousand tensors.
  data_offset_ = align_up(8 + header().size() + (uint64_t{128} << 10));
  file_.truncate(data_offset_);
}

void SafetensorsWriter::add(const std::string& name, std::string_view dtype, const Shape& shape,
                            std::span<const std::byte> bytes) {
  const std::string where = file_.path().string();
  check(!name.empty() && name != "__metadata__", "{}: a tensor cannot be called \"{}\"", where,
        name);
  const bool fresh = index_.emplace(name, entries_.size()).second;
  check(fresh, "{}: tensor {} is given twice", where, name);
  const auto wanted = safetensors_bytes(dtype, shape);
  check(wanted == bytes.size(), "{}: tensor {}: {} bytes given for {} {}", where, name,
        bytes.size(), dtype, shape);
  SafetensorsEntry e{.name = name,
                     .dtype = std::string(dtype),
                     .type = {},
                     .shape = shape,
                     .begin = data_bytes_,
                     .end = data_bytes_ + bytes.size()};
  file_.write_at(data_offset_ + data_bytes_, bytes);
  data_bytes_ = e.end;
  entries_.push_back(std::move(e));
}

void SafetensorsWriter::add(const std::string& name, const Tensor& tensor) {
  check(tensor.defined() && tensor.device() == Device{} && tensor.is_contiguous(),
        "{}: tensor {} must be contiguous and on the CPU to be written", file_.path().string(),
        name);
  const auto* p = tensor.numel() > 0 ? static_cast<const std::byte*>(tensor.raw()) : nullptr;
  add(name, dtype_name(tensor.dtype()), tensor.shape(), {p, tensor.nbytes()});
}

// Metadata first, then the tensors in the order of their data.
std::string SafetensorsWriter::header() const {
  std::string out = "{\"__metadata__\":{";
  const char* comma = "";
  for (const auto& [key, value] : metadata_) {
    out += fmt::format("{}{}:{}", comma, json_text(key), json_text(value));
    comma = ",";
  }
  out += "}";
  for (const SafetensorsEntry& e : entries_) {
    std::string sizes;
    for (int i = 0; i < e.shape.n; ++i) sizes += fmt::format("{}{}", i ? "," : "", e.shape[i]);
    out += fmt::format(",{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                       json_text(e.name), e.dtype, sizes, e.begin, e.end);
  }
  return out + "}";
}

// Moves the data within the file so that it starts at `to`.
void SafetensorsWriter::move_data(uint64_t to) {
  std::vector<std::byte> buffer(static_cast<size_t>(std::min(data_bytes_, uint64_t{8} << 20)));
  const bool up = to > data_offset_;  // then the last piece goes first
  for (uint64_t done = 0; done < data_bytes_;) {
    const uint64_t n = std::min<uint64_t>(buffer.size(), data_bytes_ - done);
    const uint64_t at = up ? data_bytes_ - done - n : done;
    const std::span piece(buffer.data(), static_cast<size_t>(n));
    file_.read_at(data_offset_ + at, piece);
    file_.write_at(to + at, piece);
    done += n;
  }
  data_offset_ = to;
}

void SafetensorsWriter::finish() {
  std::string text = header();
  const uint64_t wanted = align_up(8 + text.size());
  const uint64_t spare = data_offset_ >= wanted ? data_offset_ - wanted : 0;
  if (wanted > data_offset_ || spare > data_bytes_ / 100) move_data(wanted);
  file_.truncate(data_offset_ + data_bytes_);
  text.resize(static_cast<size_t>(data_offset_ - 8), ' ');
  check(text.size() <= 100'000'000, "{}: a header of {} bytes is more than readers accept",
        file_.path().string(), text.size());
  std::array<std::byte, 8> length;
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<std::byte>(text.size() >> (8 * i));
  file_.write_at(0, length);
  file_.write_at(8, std::as_bytes(std::span(text.data(), text.size())));
  file_.commit();
}

}  // namespace omq
