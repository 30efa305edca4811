// What the subcommands of omq-run share: opening a model, its options, and Ctrl-C.
//
// Each subcommand is a function over its own arguments, in a file of its own (run_generate.cpp …);
// omq-run.cpp picks.
#pragma once

#include <atomic>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "models/checkpoint.h"
#include "models/generator.h"
#include "models/model.h"
#include "models/tokenizer.h"
#include "tools/cli.h"

namespace omq::run {

int generate(const cli::Args& args);
int chat(const cli::Args& args);
int ppl(const cli::Args& args);
int bench(const cli::Args& args);
int info(const cli::Args& args);

// Single-dash names of several letters, as llama.cpp has them.
extern const cli::Aliases kAliases;

// ---- the model ----

struct ModelOptions {
  std::string model, device = "auto", cuda_path = "auto", isa;
  int64_t context = 0;                       // 0: the model's own, as far as memory allows
  int threads = 0;                           // 0: the CPUs that this process may use
  int64_t caches = 1;                        // of so many sequences are to fit into memory
  std::string gpu_layers, cache_k, cache_v;  // cache types; "": the model's own, else F32
  bool quiet = false;
};
// What --device and -ngl ask for. Throws UsageError, or Error when that cannot be used.
Device device_of(const ModelOptions& o);
// Adds --device and -ngl.
void add_device_options(CLI::App& app, ModelOptions& options);
// Adds -ctk and -ctv.
void add_cache_options(CLI::App& app, ModelOptions& options);
// Adds -m, -t, --device, --isa, -q and, with_context, -c and -ctk/-ctv.
void add_model_options(CLI::App& app, ModelOptions& options, bool with_context = true);
// Checks them and applies threads and instruction set. Throws UsageError.
void apply(const ModelOptions& options);

struct OpenModel {
  std::unique_ptr<CheckpointReader> reader;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Model> model;
  ModelSize size;
  double seconds = 0;  // taken by loading
};
// On its device. context 0: the model's own, cut (and said so) where its key/value cache would not
// fit into free memory.
OpenModel open_model(const ModelOptions& options, int64_t context);

// How keys and values are kept on a device: as the model quantises them itself, else as -ctk and
// -ctv say; on a GPU as these say, else in F16. Throws UsageError for types that are not there, or
// not for this model.
nn::CacheQuant kept_caches(const ModelConfig& config, const ModelOptions& options, Device device);
// "f32", "f16", or the bits of codes: "u4".
std::string cache_type(const std::optional<RowQuant>& quant, DType floats);
// Bytes of keys and values of one token, all layers.
int64_t cache_token_bytes(const ModelConfig& config, const nn::CacheQuant& kept);

// "llama 135M": the type and the number of weights, embedding and norms counted.
std::string model_name(const OpenModel& m);
int64_t parameter_count(const OpenModel& m);
// "135M", "1.24B".
std::string human_count(int64_t n);

// ---- sampling and prompts ----

struct SamplingOptions {
  SamplerOptions sampler;
  std::vector<std::string> bias;  // "ID+1.5", "ID-1.5", "ID=-inf"
  std::vector<std::string> stop;
  int64_t seed = -1;  // −1: a new one each time, printed with the figures
  int64_t max_tokens = -1, batch = 512;
  int batch_threads = 0;  // 0: as for single tokens
  bool ignore_eos = false;
};
void add_sampling_options(CLI::App& app, SamplingOptions& options);
// Throws UsageError for values out of range.
GenerateOptions generate_options(const SamplingOptions& options, int64_t vocab_size);

// The same before a model is there, whose vocabulary alone is not known yet.
void check_sampling(const SamplingOptions& options);

// A whole file, or standard input for "-".
std::string read_input(const std::string& file);

// ---- figures ----

// Several results are of continuations that were made together: tokens/s of all of them.
nlohmann::json stats_json(const GenerateResult& result, const OpenModel& m, uint64_t seed);
nlohmann::json stats_json(std::span<const GenerateResult> results, const OpenModel& m,
                          uint64_t seed);
// The block that ends a run, on stderr.
void print_stats(const GenerateResult& result, const OpenModel& m, uint64_t seed);
void print_stats(std::span<const GenerateResult> results, const OpenModel& m, uint64_t seed);

// ---- Ctrl-C ----

// The first Ctrl-C sets the flag, the second one ends the program (code 130). The count begins anew
// with release(), and when waiting for input is over. One that stops nothing, because the program
// waits, is answered with a hint.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  const std::atomic<bool>* flag() const;
  void release();
  void waiting(bool yes);
};

}  // namespace omq::run
