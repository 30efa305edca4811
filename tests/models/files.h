// Small files for the tests of models/: a folder that goes away, messages of errors, and builders
// that can write wrong files as easily as right ones.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tensor/error.h"

namespace omq {

class TempDir {
 public:
  TempDir() {
    static std::atomic<int> count{0};
    path_ =
        std::filesystem::temp_directory_path() / fmt::format("omq-test-{}-{}", ::getpid(), count++);
    std::filesystem::create_directories(path_);
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }
  size_t entries() const {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

inline std::filesystem::path write_file(const std::filesystem::path& file,
                                        std::string_view content) {
  std::ofstream out(file, std::ios::binary);
  out.write(content.data(), static_cast<std::streamsize>(content.size()));
  REQUIRE(out.good());
  return file;
}

inline std::string read_file(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  REQUIRE(in.good());
  return {std::istreambuf_iterator<char>(in), {}};
}

// The message of the Error that f throws; "" when it throws none.
template <class F> std::string message_of(F&& f) {
  try {
    std::forward<F>(f)();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

inline bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != text.npos;
}

template <class T> std::string bytes_of(T v) {
  std::string s(sizeof v, '\0');
  std::memcpy(s.data(), &v, sizeof v);
  return s;
}
template <class T> std::string bytes_of(const std::vector<T>& v) {
  std::string s(v.size() * sizeof(T), '\0');
  if (!v.empty()) std::memcpy(s.data(), v.data(), s.size());
  return s;
}

// A safetensors file from its header and its data.
inline std::string safetensors_bytes_of(std::string_view header, std::string_view data) {
  return bytes_of(uint64_t{header.size()}) + std::string(header) + std::string(data);
}

// Writes GGUF v3 bit by bit; tensors are laid out in the order given, at multiples of 32.
class GgufBuilder {
 public:
  static std::string string(std::string_view s) {
    return bytes_of(uint64_t{s.size()}) + std::string(s);
  }

  GgufBuilder& raw(std::string_view key, uint32_t kind, const std::string& value) {
    keys_ += string(key) + bytes_of(kind) + value;
    ++key_count_;
    return *this;
  }
  GgufBuilder& u32(std::string_view key, uint32_t v) { return raw(key, 4, bytes_of(v)); }
  GgufBuilder& f32(std::string_view key, float v) { return raw(key, 6, bytes_of(v)); }
  GgufBuilder& boolean(std::string_view key, bool v) { return raw(key, 7, bytes_of(uint8_t{v})); }
  GgufBuilder& text(std::string_view key, std::string_view v) { return raw(key, 8, string(v)); }
  GgufBuilder& array(std::string_view key, uint32_t kind, uint64_t n, const std::string& elements) {
    return raw(key, 9, bytes_of(kind) + bytes_of(n) + elements);
  }
  GgufBuilder& texts(std::string_view key, const std::vector<std::string>& v) {
    std::string all;
    for (const std::string& s : v) all += string(s);
    return array(key, 8, v.size(), all);
  }
  GgufBuilder& floats(std::string_view key, const std::vector<float>& v) {
    return array(key, 6, v.size(), bytes_of(v));
  }
  GgufBuilder& ints(std::string_view key, const std::vector<int32_t>& v) {
    return array(key, 5, v.size(), bytes_of(v));
  }
  // Sizes fastest first, as in the file.
  GgufBuilder& tensor(std::string_view name, const std::vector<uint64_t>& sizes, uint32_t type,
                      const std::string& data) {
    data_.resize((data_.size() + 31) / 32 * 32);
    return tensor_at(name, sizes, type, data_.size(), data);
  }
  GgufBuilder& tensor_at(std::string_view name, const std::vector<uint64_t>& sizes, uint32_t type,
                         uint64_t offset, const std::string& data = "") {
    infos_ += string(name) + bytes_of(static_cast<uint32_t>(sizes.size())) + bytes_of(sizes) +
              bytes_of(type) + bytes_of(offset);
    ++tensor_count_;
    data_ += data;
    return *this;
  }
  GgufBuilder& f32_tensor(std::string_view name, const std::vector<uint64_t>& sizes,
                          const std::vector<float>& values) {
    return tensor(name, sizes, 0, bytes_of(values));
  }
  std::string build(uint32_t version = 3) const {
    std::string head = "GGUF" + bytes_of(version) + bytes_of(tensor_count_) + bytes_of(key_count_);
    head += keys_ + infos_;
    head.resize((head.size() + 31) / 32 * 32);
    return head + data_;
  }

 private:
  std::string keys_, infos_, data_;
  uint64_t key_count_ = 0, tensor_count_ = 0;
};

// A whole GGUF model: hidden 4, 2 heads of 2, 1 key/value head, ffn 8, vocabulary 6, 1 layer;
// values are multiples of 1/64 that differ everywhere, so that a wrong order shows.
inline GgufBuilder tiny_gguf(std::string_view arch = "llama", bool tied = true) {
  const std::string p = std::string(arch) + ".";
  GgufBuilder b;
  b.text("general.architecture", arch).u32(p + "block_count", 1).u32(p + "context_length", 32);
  b.u32(p + "embedding_length", 4)
      .u32(p + "feed_forward_length", 8)
      .u32(p + "attention.head_count", 2);
  b.u32(p + "attention.head_count_kv", 1).f32(p + "attention.layer_norm_rms_epsilon", 1e-5f);
  b.f32(p + "rope.freq_base", 5e5f).text("tokenizer.ggml.model", "llama");
  b.texts("tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "\xE2\x96\x81", "a",
                                    "\xE2\x96\x81"
                                    "a"});
  b.floats("tokenizer.ggml.scores", {0, 0, 0, -1, -2, 0})
      .ints("tokenizer.ggml.token_type", {2, 3, 3, 1, 1, 1});
  b.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.eos_token_id", 2);
  b.u32("tokenizer.ggml.padding_token_id", 0xFFFFFFFFu);
  float next = 0;
  const auto add = [&](const std::string& name, std::vector<uint64_t> sizes) {
    uint64_t n = 1;
    for (const uint64_t s : sizes) n *= s;
    std::vector<float> v(n);
    for (float& x : v) x = (next += 1) / 64;
    b.f32_tensor(name, sizes, v);
  };
  add("token_embd.weight", {4, 6});
  add("blk.0.attn_norm.weight", {4});
  add("blk.0.attn_q.weight", {4, 4});
  add("blk.0.attn_k.weight", {4, 2});
  add("blk.0.attn_v.weight", {4, 2});
  add("blk.0.attn_output.weight", {4, 4});
  add("blk.0.ffn_norm.weight", {4});
  add("blk.0.ffn_gate.weight", {4, 8});
  add("blk.0.ffn_up.weight", {4, 8});
  add("blk.0.ffn_down.weight", {8, 4});
  add("output_norm.weight", {4});
  if (!tied) add("output.weight", {4, 6});
  return b;
}

}  // namespace omq
