// omq-quant's command line: our names, and the official project's.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "quant/recipe.h"
#include "tools/cli.h"
#include "tools/composition_options.h"
#include "tools/transform_options.h"

namespace omq {

// How a matrix outside the blocks is kept: as f16, or quantised to nearest.
struct KeepSpec {
  bool f16 = false;
  quant::QuantSpec spec{.wbits = 8, .abits = 16, .group_size = 128, .symmetric = false};
  std::string to_string() const;  // "f16", "w8g128"
};

struct QuantOptions {
  std::filesystem::path model, out, calib_ids;
  std::filesystem::path work;  // empty: a killed run begins anew
  std::filesystem::path page;  // the report for people; empty: none
  std::vector<std::filesystem::path> calib;
  std::string method = "omniquant";
  quant::Options recipe;
  int64_t nsamples = 128, seqlen = 2048;
  bool nsamples_given = false, seqlen_given = false;
  std::optional<int> batch_size;  // into recipe once it is checked
  uint32_t seed = 2;
  int threads = 0;
  Device device = {};
  size_t memory_limit = 0;  // bytes on the device; 0: what it has
  bool force = false, quiet = false;
  std::vector<std::string> eval;  // "ppl:FILE" or "sim:FILE"
  std::optional<int64_t> eval_context;
  int64_t eval_chunks = 0;
  std::map<std::string, KeepSpec> keep;  // "lm_head", "embed_tokens"
};

// What says how to quantise, as written: for programs that ask it among other things.
struct SettingFlags {
  std::string preset;
  std::optional<int> wbits;
  std::optional<int64_t> group_size;
  bool symmetric = false;
  TransformFlags transform;
  CompositionFlags pieces;
};
// --method, --preset, --wbits, --group-size and --symmetric.
void add_setting_options(CLI::App& app, QuantOptions& options, SettingFlags& flags);
// Flags into options.recipe. Throws UsageError.
void settle_setting(const SettingFlags& flags, QuantOptions& options);

// False when there is nothing left to do (help, version, list of methods were printed). Throws
// cli::UsageError.
bool parse_quant_options(const cli::Args& args, QuantOptions& options);

}  // namespace omq
