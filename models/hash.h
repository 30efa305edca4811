// SHA-256, so that reports can say exactly which files they are about.
//
// Reports of omq-quant and omq-run name every input with its hash; nothing here guards against an
// attacker in need of speed. Reference: FIPS 180-4, section 6.2.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace omq {

class Sha256 {
 public:
  void update(std::span<const std::byte> bytes);
  void update(std::string_view text) { update(std::as_bytes(std::span(text.data(), text.size()))); }
  // 64 lower-case hexadecimal digits. The object must not be updated afterwards.
  std::string hex();

 private:
  void compress(const uint8_t* block);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> pending_{};
  uint64_t length_ = 0;  // bytes so far
};

std::string sha256(std::span<const std::byte> bytes);
std::string sha256(std::string_view text);
// Reads the file in pieces. Throws Error when it cannot be read.
std::string sha256_file(const std::filesystem::path& file);

}  // namespace omq
