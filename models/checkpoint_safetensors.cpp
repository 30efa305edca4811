// Checkpoints in safetensors: a Hugging Face folder, sharded or not, and the single file that
// carries everything.
#include <algorithm>

#include "models/checkpoint.h"
#include "models/json_file.h"
#include "models/safetensors.h"
#include "tensor/error.h"

namespace omq {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// Files beside config.json that make the tokenizer and the defaults of generation. Texts only: they
// also go into a safetensors header. A tokenizer.model comes out as the tokenizer.json that says
// the same.
constexpr const char* kSideFiles[] = {"chat_template.jinja",   "generation_config.json",
                                      "tokenizer.json",        "special_tokens_map.json",
                                      "tokenizer_config.json", "added_tokens.json"};

// A later end-of-sequence id of generation_config.json ends text too (Llama-3 has three).
void add_generation_ids(ModelConfig& c, const json& generation) {
  const auto it = generation.find("eos_token_id");
  if (it == generation.end() || it->is_null()) return;
  for (const json& v : it->is_array() ? *it : json::array({*it})) {
    check(v.is_number_integer(), "generation_config.json: eos_token_id is not a token id");
    const auto id = v.get<int64_t>();
    auto& ids = c.eos_token_ids;
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
}

void check_format(const SafetensorsFile& file) {
  const auto it = file.metadata().find(kOmqFormatKey);
  if (it == file.metadata().end()) return;
  check(it->second == kOmqFormat,
        "{}: {} is \"{}\", this program reads \"{}\": made by another version",
        file.path().string(), kOmqFormatKey, shown(it->second, 20), kOmqFormat);
}

// For folders whose one file has a name of its own.
fs::path only_safetensors(const fs::path& folder) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") found.push_back(entry.path());
  }
  check(found.size() == 1,
        "{}: {} safetensors files, but neither model.safetensors nor model.safetensors.index.json",
        folder.string(), found.size());
  return found.front();
}

class SafetensorsCheckpoint : public CheckpointReader {
 protected:
  Tensor load(const std::string& name) const override {
    return shards_[shard_of_.find(name)->second]->get(name);
  }
  SafetensorsFile& add_shard(const fs::path& file) {
    add_file(file);
    return add_shard(std::make_unique<SafetensorsFile>(file));
  }
  SafetensorsFile& add_shard(std::unique_ptr<SafetensorsFile> shard) {
    check_format(*shard);
    shards_.push_back(std::move(shard));
    return *shards_.back();
  }
  void add_tensor(const SafetensorsEntry& e, size_t shard) {
    tensors_[e.name] = {.dtype = e.dtype, .shape = e.shape, .bytes = e.end - e.begin};
    shard_of_[e.name] = shard;
  }

 private:
  std::vector<std::unique_ptr<SafetensorsFile>> shards_;
  std::map<std::string, size_t> shard_of_;
};

class HfFolder : public SafetensorsCheckpoint {
 public:
  explicit HfFolder(const fs::path& folder) {
    path_ = folder;
    container_ = "safetensors";
    config_ = ModelConfig::from_hf_file(folder / "config.json");
    add_file(folder / "config.json");
    const fs::path generation = folder / "generation_config.json";
    if (fs::exists(generation)) {
      const json j = read_json_object(generation);
      with_context(fmt::format("reading {}", folder.string()),
                   [&] { add_generation_ids(config_, j); });
    }
    const fs::path index = folder / "model.safetensors.index.json",
                   whole = folder / "model.safetensors";
    if (fs::exists(whole))
      open_whole(whole);
    else if (fs::exists(index))
      open_shards(index);
    else
      open_whole(only_safetensors(folder));
  }

  Tokenizer tokenizer() const override { return Tokenizer::from_folder(path_); }

 protected:
  std::map<std::string, std::string> stored_side_files() const override {
    std::map<std::string, std::string> out;
    for (const char* name : kSideFiles) {
      std::error_code error;
      if (fs::is_regular_file(path_ / name, error)) out[name] = read_text_file(path_ / name);
    }
    return out;
  }

 private:
  void open_whole(const fs::path& file) {
    for (const SafetensorsEntry& e : add_shard(file).entries()) add_tensor(e, 0);
  }

  void open_shards(const fs::path& index) {
    const json j = read_json_object(index);
    const auto map = j.find("weight_map");
    check(map != j.end() && map->is_object() && !map->empty(),
          "{}: weight_map (tensor name → file name) is missing", index.string());
    std::map<std::string, std::pair<size_t, const SafetensorsFile*>> opened;
    for (const auto& [tensor, value] : map->items()) {
      const std::string file = value.is_string() ? value.get<std::string>() : "";
      // The index must not lead out of its folder.
      const bool plain =
          !file.empty() && fs::path(file).filename() == fs::path(file) && file != "..";
      check(plain, "{}: weight_map: {} is in {}, a file name is expected", index.string(),
            shown(tensor), shown(value.dump(-1, ' ', false, json::error_handler_t::replace)));
      auto it = opened.find(file);
      if (it == opened.end()) {
        const size_t number = opened.size();
        check(fs::exists(path_ / file), "{}: the file {} that its index names is missing",
              path_.string(), shown(file));
        it = opened.emplace(file, std::pair(number, &add_shard(path_ / file))).first;
      }
      const auto& [number, shard] = it->second;
      const SafetensorsEntry* e = shard->find(tensor);
      check(e != nullptr, "{}: tensor {} is not in {}, where the index places it", path_.string(),
            shown(tensor), shown(file));
      add_tensor(*e, number);
    }
  }
};

class SingleFile : public SafetensorsCheckpoint {
 public:
  explicit SingleFile(const fs::path& file) {
    path_ = file;
    container_ = "safetensors (one file)";
    open(add_shard(file));
  }
  SingleFile(std::shared_ptr<Storage> bytes, const std::string& name) {
    path_ = name;
    container_ = "safetensors (in memory)";
    open(add_shard(std::make_unique<SafetensorsFile>(std::move(bytes), name)));
  }

  Tokenizer tokenizer() const override {
    const auto optional = [&](const char* name) {
      return metadata_.contains(name) ? text(name) : "";
    };
    return with_context(fmt::format("reading {}", path_.string()), [&] {
      return Tokenizer::from_json(text("tokenizer.json"), optional("tokenizer_config.json"),
                                  optional("generation_config.json"));
    });
  }

 protected:
  std::map<std::string, std::string> stored_side_files() const override {
    std::map<std::string, std::string> out;
    for (const char* name : kSideFiles) {
      if (metadata_.contains(name)) out[name] = text(name);
    }
    return out;
  }

 private:
  void open(const SafetensorsFile& shard) {
    metadata_ = shard.metadata();
    for (const SafetensorsEntry& e : shard.entries()) add_tensor(e, 0);
    with_context(fmt::format("reading {}", path_.string()), [&] {
      check(metadata_.contains(kOmqFormatKey),
            "a safetensors file without configuration; pass the folder that holds its config.json");
      config_ = ModelConfig::from_hf(parse_json(text("config.json"), "config.json"));
      if (metadata_.contains("generation_config.json")) {
        add_generation_ids(config_,
                           parse_json(text("generation_config.json"), "generation_config.json"));
      }
    });
  }

  std::string text(const char* name) const {
    const auto it = metadata_.find(name);
    check(it != metadata_.end(), "its metadata has no {}", name);
    return it->second;
  }

  Metadata metadata_;
};

}  // namespace

std::unique_ptr<CheckpointReader> detail::open_hf_folder(const fs::path& folder) {
  return std::make_unique<HfFolder>(folder);
}

std::unique_ptr<CheckpointReader> detail::open_single_safetensors(const fs::path& file) {
  // DIR/model.safetensors of a Hugging Face folder, given by its name.
  const fs::path folder = file.has_parent_path() ? file.parent_path() : fs::path(".");
  if (file.filename() == "model.safetensors" && fs::exists(folder / "config.json")) {
    return open_hf_folder(folder);
  }
  return std::make_unique<SingleFile>(file);
}

std::unique_ptr<CheckpointReader> detail::open_safetensors_bytes(std::shared_ptr<Storage> bytes,
                                                                 const std::string& name) {
  return std::make_unique<SingleFile>(std::move(bytes), name);
}

}  // namespace omq
