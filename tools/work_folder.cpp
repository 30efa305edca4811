// See work_folder.h.
#include "tools/work_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iterator>

#include "models/atomic_dir.h"
#include "models/hash.h"
#include "models/json_file.h"
#include "models/safetensors.h"
#include "tensor/error.h"
#include "tools/report_json.h"

namespace omq {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

std::span<const std::byte> bytes_of(const Tensor& t) {
  if (t.numel() == 0) return {};
  return {static_cast<const std::byte*>(t.raw()), t.nbytes()};
}

// Of everything in a packed block, names included.
std::string packed_hash(nn::Block& packed) {
  Sha256 h;
  packed.visit([&](std::string_view name, Tensor& t) {
    h.update(name);
    h.update(bytes_of(t));
  });
  return h.hex();
}

std::string content_hash(const quant::FinishedBlock& block, const std::string& report) {
  Sha256 h;
  h.update(report);
  for (const auto& [name, value] : block.learnables) {
    h.update(name);
    h.update(bytes_of(value));
  }
  return h.hex();
}

const std::string& field(const SafetensorsFile& file, const char* key) {
  const auto it = file.metadata().find(key);
  check(it != file.metadata().end(), "{} is missing", key);
  return it->second;
}

std::string short_text(const json& j) {
  const std::string text = j.is_string() ? j.get<std::string>() : json_text(j);
  return text.size() > 40 ? text.substr(0, 37) + "…" : text;
}

void compare(const json& there, const json& here, const std::string& at, std::string& out,
             int& count) {
  static const json kNone;
  if (there == here || count >= 8) return;
  if (there.is_object() && here.is_object()) {
    json keys = there;
    keys.update(here);
    for (const auto& [key, ignored] : keys.items())
      compare(there.contains(key) ? there[key] : kNone, here.contains(key) ? here[key] : kNone,
              at.empty() ? key : at + "." + key, out, count);
    return;
  }
  ++count;
  out += fmt::format("{}{}: {} there, {} here", out.empty() ? "" : "; ", at, short_text(there),
                     short_text(here));
}

}  // namespace

std::string differences(const json& there, const json& here) {
  std::string out;
  int count = 0;
  compare(there, here, "", out, count);
  return out;
}

WorkFolder::WorkFolder(fs::path folder, const json& manifest, Notice notice)
    : folder_(std::move(folder)), notice_(std::move(notice)) {
  std::error_code error;
  fs::create_directory(folder_, error);
  check(fs::is_directory(folder_, error), "--work {}: cannot make this folder{}", folder_.string(),
        fs::exists(folder_, error) ? ": a file of this name exists" : "; does its parent exist?");
  check(fs::is_empty(folder_, error) || fs::exists(folder_ / "manifest.json", error) ||
            fs::exists(folder_ / "lock", error),
        "--work {}: the folder is not empty and not of an earlier run; choose another name",
        folder_.string());
  lock();
  try {
    settle_manifest(manifest);
  } catch (...) {
    ::close(lock_);
    throw;
  }
}

WorkFolder::~WorkFolder() { ::close(lock_); }

void WorkFolder::lock() {
  const fs::path file = folder_ / "lock";
  lock_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  check(lock_ >= 0, "{}: cannot open: {}", file.string(), std::strerror(errno));
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    const int reason = errno;
    char owner[32] = {};
    [[maybe_unused]] const auto n = ::pread(lock_, owner, sizeof owner - 1, 0);
    ::close(lock_);
    check(reason != EWOULDBLOCK,
          "--work {}: process {} is at work in this folder; wait for it, or choose another",
          folder_.string(), std::strtol(owner, nullptr, 10));
    fail("{}: cannot lock: {}", file.string(), std::strerror(reason));
  }
  const std::string pid = fmt::format("{}\n", ::getpid());
  if (::ftruncate(lock_, 0) != 0 || ::pwrite(lock_, pid.data(), pid.size(), 0) < 0)
    notice_(fmt::format("{}: cannot write to it: {}", file.string(), std::strerror(errno)));
}

void WorkFolder::settle_manifest(const json& manifest) {
  const fs::path file = folder_ / "manifest.json";
  const std::string text = json_text(manifest, 2) + "\n";
  fingerprint_ = sha256(text);
  if (!fs::exists(file)) {
    AtomicFile out(file);
    out.write(text);
    out.commit();
    return;
  }
  const std::string there = read_text_file(file);
  if (there == text) return;
  const json old = json::parse(there, nullptr, false);
  check(!old.is_discarded(), "--work {}: manifest.json cannot be read; choose another folder",
        folder_.string());
  const auto without_program = [](json j) {
    if (j.is_object()) j.erase("program");
    return j;
  };
  check(
      without_program(old) == without_program(json::parse(text)),
      "--work {}: belongs to another run: {}; repeat that run's command, or choose another folder",
      folder_.string(), differences(old, manifest));
  // Blocks that are finished come out the same wherever codes are chosen, and each is checked.
  fingerprint_ = sha256(there);
  notice_(
      fmt::format("--work {}: begun in another way: {}; finished blocks are taken over, what is "
                  "learned from here on may differ in the last bits from an unbroken run",
                  folder_.string(), differences(old, manifest)));
}

fs::path WorkFolder::block_file(int i) const {
  return folder_ / fmt::format("block-{:04}.safetensors", i);
}

int WorkFolder::finished() const {
  int n = 0;
  while (fs::exists(block_file(n))) ++n;
  return n;
}

quant::FinishedBlock WorkFolder::read(int i) const {
  const SafetensorsFile file(block_file(i));
  check(field(file, "manifest_sha256") == fingerprint_, "it belongs to another run");
  const std::string& report = field(file, "report");
  const json parsed = json::parse(report, nullptr, false);
  check(!parsed.is_discarded(), "its report cannot be read");
  quant::FinishedBlock block;
  for (const SafetensorsEntry& e : file.entries())
    block.learnables.push_back({e.name, file.get(e.name)});
  check(field(file, "content_sha256") == content_hash(block, report), "its bytes are damaged");
  block.report = block_from_json(parsed);
  block.report.index = i;
  return block;
}

std::optional<quant::FinishedBlock> WorkFolder::load(int i) {
  if (!fs::exists(block_file(i))) return std::nullopt;
  try {
    return read(i);
  } catch (const Error& e) {
    std::string what = e.what();
    if (what.find(folder_.string()) == std::string::npos)
      what = block_file(i).string() + ": " + what;
    notice_(what + "; this block and those after it are calibrated again");
    return std::nullopt;
  }
}

void WorkFolder::save(int i, const quant::FinishedBlock& block, nn::Block& packed) {
  const std::string report = json_text(block_json(block.report));
  with_context(
      "keeping what is done so far (free space and run again: nothing before is lost)", [&] {
        SafetensorsWriter out(block_file(i), {{"report", report},
                                              {"content_sha256", content_hash(block, report)},
                                              {"packed_sha256", packed_hash(packed)},
                                              {"manifest_sha256", fingerprint_}});
        for (const auto& [name, value] : block.learnables) out.add(name, value);
        out.finish();
      });
}

bool WorkFolder::confirms(int i, nn::Block& packed) {
  return field(SafetensorsFile(block_file(i)), "packed_sha256") == packed_hash(packed);
}

}  // namespace omq
