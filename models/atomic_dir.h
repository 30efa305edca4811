// All or nothing on disk: a file or folder that appears under its name only when it is complete.
//
// Everything is written beside the target under a .partial name, flushed to the disk, and renamed
// at the end; an error or an early return removes the partial. omq-quant writes its output folder
// this way, SafetensorsWriter its file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace omq {

// One output file, written front to back (with write_at for what is known only at the end).
class AtomicFile {
 public:
  // Opens NAME.partial, replacing a stale one. Throws Error naming the file and the reason.
  explicit AtomicFile(std::filesystem::path file);
  // Removes the partial unless commit() was called.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  // Appends. Throws Error (disk full, file size limit, …) naming the file and the bytes wanted.
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
  // Overwrites or extends; the end of the file, where write() goes on, moves to the furthest byte
  // written.
  void write_at(uint64_t offset, std::span<const std::byte> bytes);
  // Fills `bytes` from what was written at offset.
  void read_at(uint64_t offset, std::span<std::byte> bytes) const;
  // Cuts the file off after `bytes`.
  void truncate(uint64_t bytes);
  uint64_t size() const { return size_; }
  const std::filesystem::path& path() const { return file_; }

  // Flushes to the disk and renames to the final name, replacing an older file of that name.
  void commit();

 private:
  std::filesystem::path file_, partial_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

// One output folder.
class AtomicDir {
 public:
  // Creates OUT.partial-PID beside OUT. Throws Error when OUT exists (unless force and OUT is an
  // empty folder or holds a config.json, so that a mistyped name cannot cost anybody a home
  // folder), when the parent folder is missing, or when it cannot be written to.
  // Partial folders that killed processes left beside OUT are removed.
  explicit AtomicDir(const std::filesystem::path& out, bool force = false);
  // Removes the partial folder unless commit() was called.
  ~AtomicDir();
  AtomicDir(const AtomicDir&) = delete;
  AtomicDir& operator=(const AtomicDir&) = delete;

  // Where to write until commit().
  const std::filesystem::path& path() const { return partial_; }
  // The final place.
  const std::filesystem::path& target() const { return out_; }
  // Writes a whole file into the folder.
  void write(const std::string& name, std::string_view content) const;

  // Flushes every file and renames the folder; an old folder (force) goes away only then.
  void commit();

 private:
  std::filesystem::path out_, partial_;
  bool replace_ = false, done_ = false;
  int lock_ = -1;  // says that this process lives
};

}  // namespace omq
