// CheckpointReader: a model on disk, whatever its container, under Hugging Face's tensor names.
//
// open_checkpoint() looks at content, not at extensions: a Hugging Face folder (one or several
// safetensors), a GGUF file, a folder that holds one, or a single safetensors file of omq-quant,
// which carries its config and tokenizer. Tensors come as views of the mapped file wherever the
// file has them as they are wanted. Reference: spec/interop-formats.md §5, §7, §8.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "models/config.h"
#include "models/tokenizer.h"
#include "tensor/tensor.h"

namespace omq {

// Version of the single-file form: metadata key "omq_format". The other keys are file names
// ("config.json", "tokenizer.json", "tokenizer_config.json", …), their values the files.
inline constexpr const char* kOmqFormatKey = "omq_format";
inline constexpr const char* kOmqFormat = "1";

struct TensorInfo {
  std::string dtype;   // as stored: "BF16", "Q4_1", …
  Shape shape;         // as get() gives it
  uint64_t bytes = 0;  // as stored
};

struct CheckpointFile {
  std::filesystem::path path;
  uint64_t bytes = 0;
};

class CheckpointReader {
 public:
  virtual ~CheckpointReader() = default;

  // What was opened: a folder or a file.
  const std::filesystem::path& path() const { return path_; }
  const ModelConfig& config() const { return config_; }
  // "safetensors", "safetensors (one file)" or "GGUF v3".
  const std::string& container() const { return container_; }
  // Every file with weights, and config.json where there is one; for reports, hashed with
  // sha256_file.
  const std::vector<CheckpointFile>& files() const { return files_; }

  std::vector<std::string> names() const;  // sorted
  bool has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  // Throws Error naming file, tensor, and the nearest names that there are.
  const TensorInfo& meta(std::string_view name) const;
  // safetensors: the stored dtype, a view of the mapping. GGUF: F32, decoded, rows of q and k in
  // Hugging Face's order.
  Tensor get(std::string_view name) const;
  // The same, checked: the shape must be `shape` and floating-point values finite.
  Tensor get(std::string_view name, const Shape& shape) const;
  // Tensors of the file that are not in `used`, but for those that no model needs
  // (rotary_emb.inv_freq and the like).
  std::vector<std::string> unused(const std::set<std::string>& used) const;

  virtual Tokenizer tokenizer() const = 0;
  // Name and content of the text files that belong beside config.json in an output folder; always
  // with tokenizer.json and tokenizer_config.json, which are written anew when there are none.
  std::map<std::string, std::string> side_files() const;

 protected:
  using TensorMap = std::map<std::string, TensorInfo, std::less<>>;
  virtual Tensor load(const std::string& name) const = 0;
  virtual std::map<std::string, std::string> stored_side_files() const = 0;
  void add_file(const std::filesystem::path& file);

  std::filesystem::path path_;
  ModelConfig config_;
  std::string container_;
  std::vector<CheckpointFile> files_;
  TensorMap tensors_;
};

// Throws Error naming the path, what was found there, and what would have been understood.
std::unique_ptr<CheckpointReader> open_checkpoint(const std::filesystem::path& path);
// A model in memory: the bytes of a GGUF file, or of omq-quant's safetensors file. Tensors are
// views of them, so they must not change. `name` stands for the path in messages.
std::unique_ptr<CheckpointReader> open_checkpoint(std::shared_ptr<Storage> bytes,
                                                  const std::string& name = "model in memory");

// Throws Error when a floating-point tensor holds NaN or an infinity, with the first place of it.
void check_finite(const Tensor& t, std::string_view name);

namespace detail {  // checkpoint_safetensors.cpp, checkpoint_gguf.cpp
std::unique_ptr<CheckpointReader> open_hf_folder(const std::filesystem::path& folder);
std::unique_ptr<CheckpointReader> open_single_safetensors(const std::filesystem::path& file);
std::unique_ptr<CheckpointReader> open_gguf(const std::filesystem::path& file);
std::unique_ptr<CheckpointReader> open_safetensors_bytes(std::shared_ptr<Storage> bytes,
                                                         const std::string& name);
std::unique_ptr<CheckpointReader> open_gguf_bytes(std::shared_ptr<Storage> bytes,
                                                  const std::string& name);
// Hugging Face's name of a GGUF tensor; the name itself when there is no counterpart.
std::string hf_tensor_name(std::string_view gguf_name);
}  // namespace detail

}  // namespace omq
