// The GGUF reader: a cursor that cannot leave the file, the container's structure on top of it,
// typed access at the end.
#include "models/gguf.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "models/json_file.h"
#include "tensor/error.h"

namespace omq {

namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read without swapping bytes");

constexpr uint32_t kKinds = 13;
constexpr const char* kKindNames[kKinds] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                            "bool", "string", "array", "u64", "i64", "f64"};
// Bytes of one element; 0 for those of varying size.
constexpr uint64_t kKindBytes[kKinds] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

uint64_t kind_bytes(GgufKind k) { return kKindBytes[static_cast<uint32_t>(k)]; }

// Walks through bytes; whatever would pass their end is an Error.
class Cursor {
 public:
  explicit Cursor(std::span<const uint8_t> bytes) : bytes_(bytes) {}

  std::span<const uint8_t> take(uint64_t n, const char* what) {
    check(n <= left(), "{} needs {} bytes at offset {}, the file has {} left: cut short?", what, n,
          at_, left());
    at_ += n;
    return bytes_.subspan(static_cast<size_t>(at_ - n), static_cast<size_t>(n));
  }
  template <class T> T number(const char* what) {
    T v;
    std::memcpy(&v, take(sizeof(T), what).data(), sizeof(T));
    return v;
  }
  std::string_view string(const char* what) {
    const auto n = number<uint64_t>(what);
    const auto b = take(n, what);
    return {reinterpret_cast<const char*>(b.data()), b.size()};
  }
  uint64_t at() const { return at_; }
  uint64_t left() const { return bytes_.size() - at_; }

 private:
  std::span<const uint8_t> bytes_;
  uint64_t at_ = 0;
};

GgufKind read_kind(Cursor& c, std::string_view key) {
  const auto k = c.number<uint32_t>("a value's kind");
  check(k < kKinds, "key {}: unknown kind of value {}", shown(key), k);
  return static_cast<GgufKind>(k);
}

// Passes over the elements; their contents are looked at when asked for.
void skip_elements(Cursor& c, GgufValue& v, std::span<const uint8_t> file, std::string_view key) {
  const uint64_t start = c.at(), each = v.kind == GgufKind::String ? 8 : kind_bytes(v.kind);
  check(v.count <= c.left() / each,
        "key {}: {} elements of kind {} do not fit in the {} bytes left", shown(key), v.count,
        gguf_kind_name(v.kind), c.left());
  if (v.kind == GgufKind::String) {
    for (uint64_t i = 0; i < v.count; ++i) c.string("a string");
  } else {
    c.take(v.count * each, "a value");
  }
  v.bytes = file.subspan(static_cast<size_t>(start), static_cast<size_t>(c.at() - start));
}

GgufValue read_value(Cursor& c, std::span<const uint8_t> file, std::string_view key) {
  GgufValue v;
  v.kind = read_kind(c, key);
  if (v.kind == GgufKind::Array) {
    v.array = true;
    v.kind = read_kind(c, key);
    check(v.kind != GgufKind::Array, "key {}: arrays of arrays are not read", shown(key));
    v.count = c.number<uint64_t>("an array's length");
  }
  skip_elements(c, v, file, key);
  return v;
}

// A tensor info; its offset within the data is returned beside it.
std::pair<GgufTensor, uint64_t> read_tensor(Cursor& c) {
  GgufTensor t;
  t.name = c.string("a tensor's name");
  check(!t.name.empty() && t.name.size() <= 1024, "a tensor has a name of {} bytes", t.name.size());
  const std::string label = shown(t.name);
  const auto n = c.number<uint32_t>("a tensor's number of dims");
  check(n >= 1 && n <= 4, "tensor {}: {} dims (1 to 4 are possible)", label, n);
  uint64_t values = 1;
  std::vector<int64_t> sizes;
  for (uint32_t i = 0; i < n; ++i) {
    const auto size = c.number<uint64_t>("a tensor's size");
    check(size >= 1 && size <= (uint64_t{1} << 40) && values <= (uint64_t{1} << 44) / size,
          "tensor {}: size {} is absurd", label, size);
    values *= size;
    sizes.push_back(static_cast<int64_t>(size));
  }
  const auto type = c.number<uint32_t>("a tensor's type");
  t.type = find_ggml_type(type);
  check(t.type != nullptr, "tensor {}: unknown type number {}", label, type);
  check(sizes[0] % t.type->values == 0,
        "tensor {}: rows of {} values are no whole blocks of {} ({})", label, sizes[0],
        t.type->values, t.type->name);
  std::reverse(sizes.begin(), sizes.end());
  t.shape = Shape(std::span<const int64_t>(sizes));
  return {std::move(t), c.number<uint64_t>("a tensor's offset")};
}

uint64_t stored_bytes(const GgufTensor& t) {
  return static_cast<uint64_t>(t.shape.product() / t.type->values * t.type->bytes);
}

// Fills in where each tensor's bytes are, after checking that they are there and nobody else's.
void place_tensors(std::vector<GgufTensor>& tensors, const std::vector<uint64_t>& offsets,
                   std::span<const uint8_t> data, uint64_t alignment) {
  std::vector<size_t> order(tensors.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return offsets[a] < offsets[b]; });
  uint64_t end = 0;
  for (const size_t i : order) {
    GgufTensor& t = tensors[i];
    const uint64_t offset = offsets[i], bytes = stored_bytes(t);
    check(offset % alignment == 0, "tensor {}: offset {} is not a multiple of {}", shown(t.name),
          offset, alignment);
    check(offset <= data.size() && bytes <= data.size() - offset,
          "tensor {}: {} bytes at offset {} are not inside the {} bytes of data (file cut short?)",
          shown(t.name), bytes, offset, data.size());
    check(offset >= end, "tensor {}: its bytes overlap those of another tensor", shown(t.name));
    end = offset + bytes;
    t.bytes = data.subspan(static_cast<size_t>(offset), static_cast<size_t>(bytes));
  }
}

uint32_t read_version(Cursor& c) {
  const auto magic = c.take(4, "the magic");
  check(std::memcmp(magic.data(), "GGUF", 4) == 0, "it does not begin with \"GGUF\"");
  const auto version = c.number<uint32_t>("the version");
  check((version & 0xffffu) != 0, "a big-endian GGUF file; only little-endian ones are read");
  check(version == 2 || version == 3, "GGUF version {} is not read (2 and 3 are)", version);
  return version;
}

}  // namespace

const char* gguf_kind_name(GgufKind kind) { return kKindNames[static_cast<uint32_t>(kind)]; }

GgufFile::GgufFile(const std::filesystem::path& file) : path_(file) {
  with_context(fmt::format("reading {}", file.string()), [&] {
    std::error_code error;
    check(std::filesystem::is_regular_file(file, error), "no such file, or not a regular one");
    const uintmax_t size = std::filesystem::file_size(file, error);
    check(!error && size > 0, "empty, or its size cannot be read");
    bytes_ = Storage::map(file, 0, static_cast<size_t>(size));
    read();
  });
}

GgufFile::GgufFile(std::shared_ptr<Storage> bytes, const std::filesystem::path& name)
    : path_(name), bytes_(std::move(bytes)) {
  with_context(fmt::format("reading {}", name.string()), [&] { read(); });
}

void GgufFile::read() {
  const uint64_t size = bytes_->bytes();
  const std::span bytes(static_cast<const uint8_t*>(bytes_->data()), static_cast<size_t>(size));
  Cursor c(bytes);
  version_ = read_version(c);
  const auto tensors = c.number<uint64_t>("the number of tensors");
  const auto keys = c.number<uint64_t>("the number of keys");
  // The smallest key takes 13 bytes, the smallest tensor info 32.
  check(keys <= c.left() / 13 && tensors <= c.left() / 32,
        "it claims {} keys and {} tensors in {} bytes", keys, tensors, size);
  for (uint64_t i = 0; i < keys; ++i) {
    const std::string key(c.string("a key"));
    const GgufValue v = read_value(c, bytes, key);
    check(values_.emplace(key, v).second, "key {} is given twice", shown(key));
  }
  std::vector<uint64_t> offsets;
  for (uint64_t i = 0; i < tensors; ++i) {
    auto [t, offset] = read_tensor(c);
    check(index_.emplace(t.name, tensors_.size()).second, "tensor {} is given twice",
          shown(t.name));
    tensors_.push_back(std::move(t));
    offsets.push_back(offset);
  }
  const int64_t alignment = integer("general.alignment").value_or(32);
  check(alignment >= 1 && alignment <= (1 << 20) &&
            std::has_single_bit(static_cast<uint64_t>(alignment)),
        "general.alignment is {}, a power of two is expected", alignment);
  const auto a = static_cast<uint64_t>(alignment);
  const uint64_t start = std::min<uint64_t>((c.at() + a - 1) / a * a, size);
  place_tensors(tensors_, offsets, bytes.subspan(static_cast<size_t>(start)), a);
}

// ---- typed access

namespace {

template <class F> auto with_number(GgufKind kind, const uint8_t* p, F&& f) {
  const auto load = [&]<class T>(T v) {
    std::memcpy(&v, p, sizeof v);
    return f(v);
  };
  switch (kind) {
    case GgufKind::U8:
      return load(uint8_t{});
    case GgufKind::I8:
      return load(int8_t{});
    case GgufKind::U16:
      return load(uint16_t{});
    case GgufKind::I16:
      return load(int16_t{});
    case GgufKind::U32:
      return load(uint32_t{});
    case GgufKind::I32:
      return load(int32_t{});
    case GgufKind::U64:
      return load(uint64_t{});
    case GgufKind::I64:
      return load(int64_t{});
    case GgufKind::F32:
      return load(float{});
    default:
      return load(double{});
  }
}

bool is_real(GgufKind k) { return k == GgufKind::F32 || k == GgufKind::F64; }
bool is_integer(GgufKind k) { return kind_bytes(k) > 0 && k != GgufKind::Bool && !is_real(k); }

int64_t integer_at(GgufKind kind, const uint8_t* p) {
  return with_number(kind, p, [](auto v) -> int64_t {
    if constexpr (std::is_same_v<decltype(v), uint64_t>) {
      check(v <= uint64_t{INT64_MAX}, "{} is too large", v);
    }
    return static_cast<int64_t>(v);
  });
}

double real_at(GgufKind kind, const uint8_t* p) {
  return with_number(kind, p, [](auto v) { return static_cast<double>(v); });
}

}  // namespace

const GgufValue* GgufFile::value(std::string_view key, bool array) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return nullptr;
  check(it->second.array == array, "{}: key {} is {}", path_.string(), key,
        array ? "a single value, an array is expected" : "an array, a single value is expected");
  return &it->second;
}

namespace {
void check_kind(bool ok, const std::filesystem::path& path, std::string_view key,
                const GgufValue& v, const char* wanted) {
  check(ok, "{}: key {} is of kind {}, {} is expected", path.string(), key, gguf_kind_name(v.kind),
        wanted);
}
}  // namespace

std::optional<int64_t> GgufFile::integer(std::string_view key) const {
  const GgufValue* v = value(key, false);
  if (v == nullptr) return std::nullopt;
  check_kind(is_integer(v->kind), path_, key, *v, "a whole number");
  return with_context(key, [&] { return integer_at(v->kind, v->bytes.data()); });
}

std::optional<double> GgufFile::real(std::string_view key) const {
  const GgufValue* v = value(key, false);
  if (v == nullptr) return std::nullopt;
  check_kind(is_integer(v->kind) || is_real(v->kind), path_, key, *v, "a number");
  return real_at(v->kind, v->bytes.data());
}

std::optional<bool> GgufFile::boolean(std::string_view key) const {
  const GgufValue* v = value(key, false);
  if (v == nullptr) return std::nullopt;
  check_kind(v->kind == GgufKind::Bool, path_, key, *v, "a truth value");
  return v->bytes[0] != 0;
}

std::optional<std::string> GgufFile::text(std::string_view key) const {
  const GgufValue* v = value(key, false);
  if (v == nullptr) return std::nullopt;
  check_kind(v->kind == GgufKind::String, path_, key, *v, "a string");
  return std::string(Cursor(v->bytes).string("a string"));
}

std::optional<std::vector<std::string>> GgufFile::texts(std::string_view key) const {
  const GgufValue* v = value(key, true);
  if (v == nullptr) return std::nullopt;
  check_kind(v->kind == GgufKind::String, path_, key, *v, "an array of strings");
  std::vector<std::string> out;
  out.reserve(static_cast<size_t>(v->count));  // checked against the file's size when it was opened
  Cursor c(v->bytes);
  for (uint64_t i = 0; i < v->count; ++i) out.emplace_back(c.string("a string"));
  return out;
}

std::optional<std::vector<int64_t>> GgufFile::integers(std::string_view key) const {
  const GgufValue* v = value(key, true);
  if (v == nullptr) return std::nullopt;
  check_kind(is_integer(v->kind), path_, key, *v, "an array of whole numbers");
  std::vector<int64_t> out;
  out.reserve(static_cast<size_t>(v->count));
  const uint64_t each = kind_bytes(v->kind);
  for (uint64_t i = 0; i < v->count; ++i)
    out.push_back(integer_at(v->kind, v->bytes.data() + i * each));
  return out;
}

std::optional<std::vector<float>> GgufFile::reals(std::string_view key) const {
  const GgufValue* v = value(key, true);
  if (v == nullptr) return std::nullopt;
  check_kind(is_real(v->kind), path_, key, *v, "an array of real numbers");
  std::vector<float> out;
  out.reserve(static_cast<size_t>(v->count));
  const uint64_t each = kind_bytes(v->kind);
  for (uint64_t i = 0; i < v->count; ++i) {
    out.push_back(static_cast<float>(real_at(v->kind, v->bytes.data() + i * each)));
  }
  return out;
}

// ---- tensors

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

Tensor GgufFile::get_f32(std::string_view name) const {
  const GgufTensor* t = find(name);
  check(t != nullptr, "{}: no tensor {}", path_.string(), shown(name));
  check(t->type->decode != nullptr, "{}: tensor {} is of type {}, which is not read",
        path_.string(), shown(name), t->type->name);
  const auto offset =
      static_cast<size_t>(t->bytes.data() - static_cast<const uint8_t*>(bytes_->data()));
  if (t->type->id == kGgmlF32 &&
      reinterpret_cast<uintptr_t>(t->bytes.data()) % alignof(float) == 0) {
    return Tensor::view(bytes_, offset, t->shape, DType::F32);
  }
  Tensor out = Tensor::empty(t->shape, DType::F32);
  ggml_to_f32(*t->type, t->bytes, out.data<float>(), t->shape.product());
  return out;
}

}  // namespace omq
