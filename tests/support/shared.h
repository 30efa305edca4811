// Where tests find files: the source tree, reference data beside it, the real model.
//
// Reference data is too large for the repository and may be absent: then a test says so with
// MESSAGE("skipped: …") and returns. `make test` collects these lines at its end, so that nothing
// is left out silently.
//
//   const auto text = shared_path("data/wikitext2/wiki.test.raw");
//   if (!text) { MESSAGE("skipped: no shared/data/wikitext2"); return; }
#pragma once

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string_view>

#ifndef OMQ_SOURCE_DIR
#define OMQ_SOURCE_DIR "."  // compiled by hand, run from the root of the tree
#endif

namespace omq {

// A file or folder of the source tree, "tests/fixtures/tiny-llama"; not checked for existence. A
// test program that was carried elsewhere finds the tree by $OMQ_SOURCE_DIR.
inline std::filesystem::path source_path(std::string_view relative) {
  const char* root = std::getenv("OMQ_SOURCE_DIR");
  return std::filesystem::path(root ? root : OMQ_SOURCE_DIR) / relative;
}

namespace detail {
inline std::optional<std::filesystem::path> existing(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return std::nullopt;
  return path;
}
}  // namespace detail

// A file or folder of the reference data: under $OMQ_SHARED, else in the folder shared/ beside the
// source tree.
inline std::optional<std::filesystem::path> shared_path(std::string_view relative) {
  const char* root = std::getenv("OMQ_SHARED");
  const std::filesystem::path base =
      root ? std::filesystem::path(root) : source_path("..") / "shared";
  return detail::existing(base / relative);
}

// The real model's GGUF: $OMQ_SMOLLM2, else where `make smollm2` puts it.
inline std::optional<std::filesystem::path> smollm2_gguf() {
  if (const char* path = std::getenv("OMQ_SMOLLM2")) return detail::existing(path);
  return detail::existing(source_path(".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"));
}

}  // namespace omq
