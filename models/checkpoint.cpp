// Opening a checkpoint by content, and what all containers share: lookup, checks, messages.
#include "models/checkpoint.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "models/json_file.h"
#include "tensor/error.h"
#include "tensor/numeric.h"
#include "tensor/parallel.h"

namespace omq {

namespace fs = std::filesystem;

namespace {

// Levenshtein distance.
size_t distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t change = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({change, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

std::string nearest(std::string_view name, const std::vector<std::string>& names) {
  std::vector<std::pair<size_t, std::string>> ranked;
  const size_t limit = std::min<size_t>(names.size(), 4096);  // a message must not take seconds
  for (size_t i = 0; i < limit; ++i) {
    ranked.emplace_back(distance(name, std::string_view(names[i]).substr(0, 256)), names[i]);
  }
  const size_t n = std::min<size_t>(ranked.size(), 3);
  std::partial_sort(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(n), ranked.end());
  std::string out;
  for (size_t i = 0; i < n; ++i) out += fmt::format("{}{}", i ? ", " : "", shown(ranked[i].second));
  return out;
}

template <class T> bool is_finite(T v) { return std::isfinite(static_cast<double>(v)); }
bool is_finite(bf16_t v) { return (v.bits & 0x7f80u) != 0x7f80u; }
bool is_finite(f16_t v) { return (v.bits & 0x7c00u) != 0x7c00u; }
bool is_finite(float v) { return (std::bit_cast<uint32_t>(v) & 0x7f800000u) != 0x7f800000u; }

template <class T> void check_values(const Tensor& t, std::string_view name) {
  const T* p = t.data<T>();
  std::atomic<int64_t> first{INT64_MAX};
  parallel_for(t.numel(), int64_t{1} << 16, [&](int64_t begin, int64_t end) {
    bool ok = true;
    for (int64_t i = begin; i < end; ++i) ok &= is_finite(p[i]);
    if (ok) return;
    const int64_t at = std::find_if(p + begin, p + end, [](T v) { return !is_finite(v); }) - p;
    int64_t seen = first.load();
    while (at < seen && !first.compare_exchange_weak(seen, at)) {
    }
  });
  const int64_t at = first.load();
  check(at == INT64_MAX, "tensor {}: value {} of {} is {}", shown(name), at, t.numel(),
        at == INT64_MAX ? 0.0f : static_cast<float>(p[at]));
}

// The file's first bytes, fewer when it is shorter.
std::string first_bytes(const fs::path& file, size_t n) {
  // Not a stream: these would be the only ones of the library, half a megabyte of a static program.
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> in(std::fopen(file.c_str(), "rb"),
                                                           &std::fclose);
  check(in != nullptr, "{}: cannot open: {}", file.string(), std::strerror(errno));
  std::string head(n, '\0');
  head.resize(std::fread(head.data(), 1, n, in.get()));
  return head;
}

enum class Container { Gguf, Safetensors };

// By the first bytes of a file. Throws Error naming it when they are of neither.
Container container_of(std::string_view head, const std::string& name) {
  if (head.starts_with("GGUF")) return Container::Gguf;
  check(!head.starts_with("PK") && !head.starts_with("\x80"),
        "{}: a PyTorch (pickle) file; convert the model to safetensors first", name);
  const bool safetensors = head.size() >= 9 && head[8] == '{';
  check(safetensors, "{}: neither GGUF nor safetensors; the file begins with \"{}\"", name,
        shown(head, 8));
  return Container::Safetensors;
}

std::unique_ptr<CheckpointReader> open_file(const fs::path& file) {
  return container_of(first_bytes(file, 9), file.string()) == Container::Gguf
             ? detail::open_gguf(file)
             : detail::open_single_safetensors(file);
}

std::unique_ptr<CheckpointReader> open_folder(const fs::path& folder) {
  std::vector<fs::path> ggufs;
  bool safetensors = false, pickles = false;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string extension = entry.path().extension().string();
    if (extension == ".gguf") ggufs.push_back(entry.path());
    safetensors |= extension == ".safetensors";
    pickles |= extension == ".bin" || extension == ".pt" || extension == ".pth";
  }
  check(!error, "{}: cannot list the folder: {}", folder.string(), error.message());
  const bool config = fs::exists(folder / "config.json", error);
  if (config && safetensors) return detail::open_hf_folder(folder);
  if (ggufs.size() == 1) return open_file(ggufs.front());
  check(ggufs.empty(), "{}: holds {} GGUF files; name the one that is meant", folder.string(),
        ggufs.size());
  check(!safetensors, "{}: holds safetensors but no config.json", folder.string());
  check(!pickles, "{}: holds no safetensors, only PyTorch (pickle) files; convert them first",
        folder.string());
  fail("{}: no model here (config.json with model.safetensors, or one GGUF file, is expected)",
       folder.string());
}

}  // namespace

void check_finite(const Tensor& t, std::string_view name) {
  if (t.numel() == 0) return;
  switch (t.dtype()) {
    case DType::F64:
      return check_values<double>(t, name);
    case DType::F32:
      return check_values<float>(t, name);
    case DType::BF16:
      return check_values<bf16_t>(t, name);
    case DType::F16:
      return check_values<f16_t>(t, name);
    default:
      return;
  }
}

void CheckpointReader::add_file(const fs::path& file) {
  std::error_code error;
  const uintmax_t bytes = fs::file_size(file, error);
  files_.push_back({file, error ? 0 : static_cast<uint64_t>(bytes)});
}

std::vector<std::string> CheckpointReader::names() const {
  std::vector<std::string> out;
  for (const auto& [name, info] : tensors_) out.push_back(name);
  return out;
}

const TensorInfo& CheckpointReader::meta(std::string_view name) const {
  const auto it = tensors_.find(name);
  if (it != tensors_.end()) return it->second;
  fail("{}: no tensor {}; the nearest of its {} tensors are: {}", path_.string(), shown(name),
       tensors_.size(), nearest(name, names()));
}

Tensor CheckpointReader::get(std::string_view name) const {
  meta(name);
  return load(std::string(name));
}

Tensor CheckpointReader::get(std::string_view name, const Shape& shape) const {
  const TensorInfo& info = meta(name);
  check(info.shape == shape, "{}: tensor {} has shape {}, the configuration asks for {}",
        path_.string(), shown(name), info.shape, shape);
  Tensor t = load(std::string(name));
  with_context(fmt::format("reading {}", path_.string()), [&] { check_finite(t, name); });
  return t;
}

std::vector<std::string> CheckpointReader::unused(const std::set<std::string>& used) const {
  // Tables that the model computes for itself, and what some training programs leave behind.
  constexpr std::array<std::string_view, 4> kNotNeeded = {
      "rotary_emb.inv_freq", "rope_freqs.weight", "self_attn.masked_bias", "attn_rot_embd.weight"};
  std::vector<std::string> out;
  for (const auto& [name, info] : tensors_) {
    const std::string& n = name;
    const bool needless = std::any_of(kNotNeeded.begin(), kNotNeeded.end(),
                                      [&](std::string_view end) { return n.ends_with(end); });
    const bool tied_head = n == "lm_head.weight" && config_.tie_word_embeddings;
    if (!needless && !tied_head && !used.contains(n)) out.push_back(n);
  }
  return out;
}

std::map<std::string, std::string> CheckpointReader::side_files() const {
  std::map<std::string, std::string> out = stored_side_files();
  if (!out.contains("tokenizer.json") || !out.contains("tokenizer_config.json")) {
    const Tokenizer t = tokenizer();
    out.try_emplace("tokenizer.json", t.to_tokenizer_json());
    out.try_emplace("tokenizer_config.json", t.to_tokenizer_config_json());
    out.try_emplace("generation_config.json", t.to_generation_config_json());
  }
  return out;
}

std::unique_ptr<CheckpointReader> open_checkpoint(const fs::path& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  check(fs::exists(status), "{}: no such file or folder", path.string());
  if (fs::is_directory(status)) return open_folder(path);
  check(fs::is_regular_file(status), "{}: neither a file nor a folder", path.string());
  return open_file(path);
}

std::unique_ptr<CheckpointReader> open_checkpoint(std::shared_ptr<Storage> bytes,
                                                  const std::string& name) {
  const std::string_view head(static_cast<const char*>(bytes->data()),
                              std::min<size_t>(bytes->bytes(), 9));
  return container_of(head, name) == Container::Gguf
             ? detail::open_gguf_bytes(std::move(bytes), name)
             : detail::open_safetensors_bytes(std::move(bytes), name);
}

}  // namespace omq
