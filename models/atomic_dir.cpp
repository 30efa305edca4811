// Writing beside the target and renaming at the end; every system call is checked, and made in a
// statement of its own, since the arguments of check() are evaluated in any order and one is errno.
#include "models/atomic_dir.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "tensor/error.h"

namespace omq {

namespace fs = std::filesystem;

namespace {

// "out/" → "out": the partial lies beside the target, not in it.
fs::path without_slash(fs::path p) {
  p = p.lexically_normal();
  return p.has_filename() ? p : p.parent_path();
}

fs::path parent_of(const fs::path& p) {
  return p.has_parent_path() ? p.parent_path() : fs::path(".");
}

// Flushes a file or folder to the disk; file systems that cannot sync a folder are forgiven.
void sync_path(const fs::path& p, bool folder) {
  const int fd = ::open(p.c_str(), O_RDONLY | O_CLOEXEC);
  check(fd >= 0, "{}: cannot open for flushing: {}", p.string(), std::strerror(errno));
  const bool ok = ::fsync(fd) == 0 || (folder && errno == EINVAL);
  const int error = errno;
  ::close(fd);
  check(ok, "{}: cannot flush to the disk: {}", p.string(), std::strerror(error));
}

void rename_path(const fs::path& from, const fs::path& to) {
  const bool ok = ::rename(from.c_str(), to.c_str()) == 0;
  check(ok, "{}: cannot rename {} to it: {}", to.string(), from.string(), std::strerror(errno));
}

// Removes the partial folders of `out` whose process was killed: no process of their number lives,
// and nobody holds their lock (which covers other machines and other process number spaces).
void remove_orphans(const fs::path& out) {
  std::error_code error;
  const std::string stem = out.filename().string() + ".partial-";
  for (const auto& entry : fs::directory_iterator(parent_of(out), error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(stem) || !entry.is_directory(error)) continue;
    const std::string number = name.substr(stem.size());
    if (number.empty() || number.size() > 9 ||
        number.find_first_not_of("0123456789") != std::string::npos)
      continue;
    if (::kill(static_cast<pid_t>(std::stol(number)), 0) == 0 || errno != ESRCH) continue;
    const int fd = ::open(entry.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) continue;
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) fs::remove_all(entry.path(), error);
    ::close(fd);
  }
}

}  // namespace

// ---- AtomicFile

AtomicFile::AtomicFile(fs::path file) : file_(std::move(file)), partial_(file_) {
  partial_ += ".partial";
  check(!fs::is_directory(file_), "{}: cannot write: a folder of this name exists", file_.string());
  const int flags = O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW;
  fd_ = ::open(partial_.c_str(), flags, 0666);
  check(fd_ >= 0, "{}: cannot create: {}", partial_.string(), std::strerror(errno));
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(partial_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) { write_at(size_, bytes); }

void AtomicFile::write_at(uint64_t offset, std::span<const std::byte> bytes) {
  check(fd_ >= 0, "{}: written to after it was finished", file_.string());
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n =
        ::pwrite(fd_, bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    check(n > 0, "{}: cannot write {} bytes at offset {}: {}", file_.string(), bytes.size() - done,
          offset + done, n == 0 ? "nothing was written" : std::strerror(errno));
    done += static_cast<size_t>(n);
  }
  if (offset + done > size_) size_ = offset + done;
}

void AtomicFile::read_at(uint64_t offset, std::span<std::byte> bytes) const {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n =
        ::pread(fd_, bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    check(n > 0, "{}: cannot read back {} bytes at offset {}: {}", file_.string(),
          bytes.size() - done, offset + done, n == 0 ? "end of file" : std::strerror(errno));
    done += static_cast<size_t>(n);
  }
}

void AtomicFile::truncate(uint64_t bytes) {
  const bool ok = ::ftruncate(fd_, static_cast<off_t>(bytes)) == 0;
  check(ok, "{}: cannot set its size to {} bytes: {}", file_.string(), bytes, std::strerror(errno));
  size_ = bytes;
}

void AtomicFile::commit() {
  check(fd_ >= 0, "{}: finished twice", file_.string());
  const bool flushed = ::fsync(fd_) == 0;
  check(flushed, "{}: cannot flush to the disk: {}", file_.string(), std::strerror(errno));
  rename_path(partial_, file_);
  const int fd = fd_;
  fd_ = -1;  // the partial is gone: nothing to remove any more
  // Some network file systems report a full disk only here.
  const bool closed = ::close(fd) == 0;
  check(closed, "{}: cannot close: {}", file_.string(), std::strerror(errno));
  sync_path(parent_of(file_), /*folder=*/true);  // a rename lasts once its folder does
}

// ---- AtomicDir

AtomicDir::AtomicDir(const fs::path& out, bool force) : out_(without_slash(out)) {
  std::error_code error;
  check(!out.empty(), "output folder: the name is empty");
  // Through a symbolic link, so that the link stays and its target is replaced.
  if (fs::is_symlink(out_, error)) out_ = fs::weakly_canonical(out_, error);
  const fs::path parent = parent_of(out_);
  check(fs::is_directory(parent, error), "output folder {}: the folder {} does not exist",
        out.string(), parent.string());
  if (fs::exists(fs::symlink_status(out_, error))) {
    check(force, "output folder {}: it exists; choose another name or pass --force", out.string());
    check(fs::is_directory(out_, error), "output folder {}: a file of this name exists",
          out.string());
    const bool ours = fs::is_empty(out_, error) || fs::exists(out_ / "config.json", error);
    check(ours,
          "output folder {}: not replaced even with --force, since it is not empty and holds no "
          "config.json",
          out.string());
    replace_ = true;
  }
  partial_ = out_;
  partial_ += fmt::format(".partial-{}", ::getpid());
  fs::remove_all(partial_, error);  // left over from a process of the same number that was killed
  const bool made = ::mkdir(partial_.c_str(), 0777) == 0;
  check(made, "output folder {}: cannot create {}: {}", out.string(), partial_.string(),
        std::strerror(errno));
  lock_ = ::open(partial_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_ >= 0) ::flock(lock_, LOCK_EX | LOCK_NB);  // a file system without locks is forgiven
  remove_orphans(out_);
}

AtomicDir::~AtomicDir() {
  if (lock_ >= 0) ::close(lock_);
  if (done_) return;
  std::error_code ignored;
  fs::remove_all(partial_, ignored);
}

void AtomicDir::write(const std::string& name, std::string_view content) const {
  AtomicFile file(partial_ / name);
  file.write(content);
  file.commit();
}

void AtomicDir::commit() {
  check(!done_, "output folder {}: finished twice", out_.string());
  for (const auto& entry : fs::recursive_directory_iterator(partial_)) {
    if (entry.is_regular_file()) sync_path(entry.path(), /*folder=*/false);
  }
  sync_path(partial_, /*folder=*/true);
  if (!replace_) {
    // rename() would silently swallow an empty folder made in the meantime: harmless.
    rename_path(partial_, out_);
  } else {
    fs::path old = out_;
    old += fmt::format(".old-{}", ::getpid());
    rename_path(out_, old);
    try {
      rename_path(partial_, out_);
    } catch (const Error&) {
      std::error_code ignored;
      fs::rename(old, out_, ignored);
      throw;
    }
    std::error_code ignored;
    fs::remove_all(old, ignored);
  }
  done_ = true;
  sync_path(parent_of(out_), /*folder=*/true);
}

}  // namespace omq
