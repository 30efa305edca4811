// What is done with hostile bytes: opened, and everything that opened is read to the end. Anything
// but success or an omq::Error is a fault. Shared by the ordinary test (parsers_test.cpp) and the
// libFuzzer programs.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <string_view>

#include "models/checkpoint.h"
#include "models/gguf.h"
#include "models/json_file.h"
#include "models/safetensors.h"
#include "tensor/error.h"

namespace omq::fuzz {

// A file in memory, with a path.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view bytes) : fd_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    size_t done = 0;
    while (fd_ >= 0 && done < bytes.size()) {
      const ssize_t n = ::write(fd_, bytes.data() + done, bytes.size() - done);
      if (n <= 0) break;
      done += static_cast<size_t>(n);
    }
    check(fd_ >= 0 && done == bytes.size(), "fuzz: cannot write {} bytes to memory", bytes.size());
  }
  ~MemoryFile() {
    if (fd_ >= 0) ::close(fd_);
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::filesystem::path path() const { return fmt::format("/proc/self/fd/{}", fd_); }

 private:
  int fd_;
};

template <class F> bool accepts(F&& f) {
  try {
    f();
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Reads every byte of t, so that a view outside its file would show.
inline uint64_t touch(const Tensor& t) {
  const auto* p = static_cast<const unsigned char*>(t.numel() > 0 ? t.raw() : nullptr);
  uint64_t sum = 0;
  for (size_t i = 0; i < t.nbytes(); ++i) sum += p[i];
  return sum;
}

inline bool safetensors(std::string_view bytes) {
  const MemoryFile file(bytes);
  return accepts([&] {
    const SafetensorsFile f(file.path());
    for (const SafetensorsEntry& e : f.entries()) {
      if (e.type) touch(f.get(e.name));
    }
  });
}

inline bool gguf(std::string_view bytes) {
  const MemoryFile file(bytes);
  return accepts([&] {
    const GgufFile f(file.path());
    for (const GgufTensor& t : f.tensors()) accepts([&] { touch(f.get_f32(t.name)); });
    for (const auto& [key, value] : f.values()) {
      const std::string& k = key;
      accepts([&] { (void)f.integer(k); });
      accepts([&] { (void)f.texts(k); });
      accepts([&] { (void)f.integers(k); });
      accepts([&] { (void)f.reals(k); });
    }
  });
}

// A model file of either kind with its configuration; `tokenizer` too.
inline bool checkpoint(std::string_view bytes, bool tokenizer) {
  const MemoryFile file(bytes);
  return accepts([&] {
    const auto c = open_checkpoint(file.path());
    for (const std::string& name : c->names()) accepts([&] { touch(c->get(name)); });
    (void)c->config().to_hf_json();
    if (tokenizer) (void)c->tokenizer().encode("a  b\n");
  });
}

inline bool config(std::string_view text) {
  return accepts([&] { (void)ModelConfig::from_hf(parse_json(text, "config.json")); });
}

}  // namespace omq::fuzz
