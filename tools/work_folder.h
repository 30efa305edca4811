// The folder of --work: finished blocks of a run, so that a killed one goes on where it stopped.
//
//   manifest.json            what the run is: model, calibration, settings, program; readable, and
//                            the fingerprint: a run with another one is refused with the difference
//   block-0007.safetensors   learnables of a finished block; its metadata holds the block's report,
//                            a hash of both, of the packed tensors, and of the manifest
//   lock                     held (flock) while a run is at work, with its process number
//
// Every file is written beside its name, flushed and renamed.
#pragma once

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "quant/hooks.h"

namespace omq {

class WorkFolder final : public quant::BlockStore {
 public:
  using Notice = std::function<void(const std::string&)>;

  // Makes the folder, or opens that of an earlier run. Throws Error when another process works in
  // it, when it belongs to a run with another manifest (naming what differs), or when it is not
  // such a folder.
  WorkFolder(std::filesystem::path folder, const nlohmann::json& manifest, Notice notice);
  ~WorkFolder() override;
  WorkFolder(const WorkFolder&) = delete;
  WorkFolder& operator=(const WorkFolder&) = delete;

  // How many blocks from the first on are there, whole or not.
  int finished() const;

  std::optional<quant::FinishedBlock> load(int i) override;
  void save(int i, const quant::FinishedBlock& block, nn::Block& packed) override;
  bool confirms(int i, nn::Block& packed) override;

 private:
  std::filesystem::path block_file(int i) const;
  void lock();
  void settle_manifest(const nlohmann::json& manifest);
  quant::FinishedBlock read(int i) const;

  std::filesystem::path folder_;
  Notice notice_;
  std::string fingerprint_;  // sha256 of the manifest
  int lock_ = -1;
};

// Places at which two manifests differ, one a line: "settings.wbits: 3 there, 4 here". At most 8.
std::string differences(const nlohmann::json& there, const nlohmann::json& here);

}  // namespace omq
