// The safetensors reader: header checks first, tensors as views of the mapping after that.
#include "models/safetensors.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "models/json_file.h"
#include "tensor/error.h"

namespace omq {

namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeader = 100'000'000;  // the limit of the reference reader

struct DtypeRow {
  const char* name;
  uint64_t bytes;
  std::optional<DType> type;
};
constexpr DtypeRow kDtypes[] = {
    {"F64", 8, DType::F64},       {"F32", 4, DType::F32},      {"F16", 2, DType::F16},
    {"BF16", 2, DType::BF16},     {"I64", 8, std::nullopt},    {"I32", 4, DType::I32},
    {"I16", 2, std::nullopt},     {"I8", 1, DType::I8},        {"U64", 8, std::nullopt},
    {"U32", 4, std::nullopt},     {"U16", 2, std::nullopt},    {"U8", 1, DType::U8},
    {"BOOL", 1, std::nullopt},    {"C64", 8, std::nullopt},    {"F8_E4M3", 1, std::nullopt},
    {"F8_E5M2", 1, std::nullopt}, {"F8_E8M0", 1, std::nullopt}};

const DtypeRow* find_dtype(std::string_view name) {
  const auto* row = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                 [&](const DtypeRow& r) { return name == r.name; });
  return row == std::end(kDtypes) ? nullptr : row;
}

uint64_t unsigned_of(const json& value, const std::string& what) {
  check(value.is_number_unsigned(), "{} is {}, a whole number is expected", what,
        shown(value.dump(-1, ' ', false, json::error_handler_t::replace), 40));
  return value.get<uint64_t>();
}

const json& member(const json& object, const char* key, const std::string& tensor) {
  check(object.is_object(), "tensor {}: its header entry is not an object", tensor);
  const auto it = object.find(key);
  check(it != object.end(), "tensor {}: its header entry has no \"{}\"", tensor, key);
  return *it;
}

SafetensorsEntry parse_entry(const std::string& name, const json& value, uint64_t data_bytes) {
  const std::string label = shown(name);
  SafetensorsEntry e;
  e.name = name;
  const json& dtype = member(value, "dtype", label);
  check(dtype.is_string(), "tensor {}: its dtype is not a string", label);
  e.dtype = dtype.get<std::string>();
  const DtypeRow* row = find_dtype(e.dtype);
  check(row != nullptr, "tensor {}: unknown dtype \"{}\"", label, shown(e.dtype, 20));
  e.type = row->type;
  const json& shape = member(value, "shape", label);
  check(shape.is_array() && shape.size() <= Dims::kMax,
        "tensor {}: its shape is not a list of at most {} sizes", label, Dims::kMax);
  for (const json& size : shape) {
    const uint64_t n = unsigned_of(size, fmt::format("tensor {}: a size in its shape", label));
    check(n < (uint64_t{1} << 62), "tensor {}: a size of {} in its shape is absurd", label, n);
    e.shape.push_back(static_cast<int64_t>(n));
  }
  const json& offsets = member(value, "data_offsets", label);
  check(offsets.is_array() && offsets.size() == 2,
        "tensor {}: its data_offsets are not two whole numbers", label);
  e.begin = unsigned_of(offsets[0], fmt::format("tensor {}: data_offsets[0]", label));
  e.end = unsigned_of(offsets[1], fmt::format("tensor {}: data_offsets[1]", label));
  check(e.begin <= e.end && e.end <= data_bytes,
        "tensor {}: bytes {} to {} are not inside the {} bytes of data (file cut short?)", label,
        e.begin, e.end, data_bytes);
  const auto bytes = safetensors_bytes(e.dtype, e.shape);
  check(bytes && *bytes == e.end - e.begin, "tensor {}: {} {} does not fill its {} bytes", label,
        e.dtype, e.shape, e.end - e.begin);
  return e;
}

Metadata parse_metadata(const json& value) {
  check(value.is_object(), "header: __metadata__ is not an object");
  Metadata out;
  for (const auto& [key, text] : value.items()) {
    check(text.is_string(), "header: __metadata__ \"{}\" is not a string", shown(key));
    out[key] = text.get<std::string>();
  }
  return out;
}

}  // namespace

std::optional<uint64_t> safetensors_bytes(std::string_view dtype, const Shape& shape) {
  const DtypeRow* row = find_dtype(dtype);
  if (row == nullptr) return std::nullopt;
  uint64_t n = row->bytes;
  bool empty = false;
  for (int i = 0; i < shape.n; ++i) {
    if (shape[i] < 0) return std::nullopt;
    const auto size = static_cast<uint64_t>(shape[i]);
    empty |= size == 0;
    if (size > 0 && n > (uint64_t{1} << 62) / size) return std::nullopt;
    if (size > 0) n *= size;
  }
  return empty ? 0 : n;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& file) : path_(file) {
  with_context(fmt::format("reading {}", file.string()), [&] {
    std::error_code error;
    check(std::filesystem::is_regular_file(file, error), "no such file, or not a regular one");
    const uintmax_t size = std::filesystem::file_size(file, error);
    check(!error, "cannot read: {}", error.message());
    bytes_ = Storage::map(file, 0, static_cast<size_t>(size));
    read();
  });
}

SafetensorsFile::SafetensorsFile(std::shared_ptr<Storage> bytes, const std::filesystem::path& name)
    : path_(name), bytes_(std::move(bytes)) {
  with_context(fmt::format("reading {}", name.string()), [&] { read(); });
}

void SafetensorsFile::read() {
  const uint64_t size = bytes_->bytes();
  check(size >= 10, "{} bytes are too few for a safetensors file", size);
  const auto* base = static_cast<const unsigned char*>(bytes_->data());
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | base[i];
  check(length <= kMaxHeader, "a header of {} bytes is refused (at most {}); is this safetensors?",
        length, kMaxHeader);
  check(length >= 2 && length <= size - 8,
        "the header claims {} bytes, the file has {} after its length: cut short?", length,
        size - 8);
  data_offset_ = 8 + length;
  read_header({reinterpret_cast<const char*>(base) + 8, static_cast<size_t>(length)},
              size - data_offset_);
}

void SafetensorsFile::read_header(std::string_view header, uint64_t data_bytes) {
  check(header.front() == '{', "header: it does not begin with \"{{\"; is this safetensors?");
  const json root = parse_json(header, "header");
  for (const auto& [name, value] : root.items()) {
    if (name == "__metadata__") {
      metadata_ = parse_metadata(value);
    } else {
      entries_.push_back(parse_entry(name, value, data_bytes));
    }
  }
  std::sort(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t covered = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const SafetensorsEntry& e = entries_[i];
    check(e.begin == covered,
          "tensor {}: its bytes begin at {}, the tensor before it ends at {}: {}", shown(e.name),
          e.begin, covered, e.begin < covered ? "they overlap" : "there is a gap");
    covered = e.end;
    index_[e.name] = i;
  }
  check(covered == data_bytes, "the tensors end at byte {} of {} bytes of data", covered,
        data_bytes);
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &entries_[it->second];
}

Tensor SafetensorsFile::get(std::string_view name) const {
  const SafetensorsEntry* e = find(name);
  check(e != nullptr, "{}: no tensor {}", path_.string(), shown(name));
  check(e->type.has_value(), "{}: tensor {} has dtype {}, which cannot be read here",
        path_.string(), shown(name), e->dtype);
  const uint64_t offset = data_offset_ + e->begin;
  const auto address = reinterpret_cast<uintptr_t>(bytes_->data()) + offset;
  if (address % dtype_size(*e->type) == 0) return Tensor::view(bytes_, offset, e->shape, *e->type);
  Tensor copy = Tensor::empty(e->shape, *e->type);
  if (e->end > e->begin) {
    std::memcpy(copy.raw(), static_cast<const char*>(bytes_->data()) + offset, e->end - e->begin);
  }
  return copy;
}

}  // namespace omq
