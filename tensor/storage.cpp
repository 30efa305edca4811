// Storage: allocation through the device table, and read-only file mapping.
#include "tensor/storage.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "tensor/allocator.h"
#include "tensor/error.h"

namespace omq {

namespace {

constexpr size_t kAlign = 64;
thread_local const Allocator* own_allocator = nullptr;

}  // namespace

AllocatorScope::AllocatorScope(const Allocator& allocator)
    : before_(std::exchange(own_allocator, &allocator)) {}
AllocatorScope::~AllocatorScope() { own_allocator = before_; }

std::shared_ptr<Storage> Storage::allocate(size_t bytes, Device device) {
  std::shared_ptr<Storage> s(new Storage);
  if (own_allocator && device.type == DeviceType::CPU) {
    const Allocator a = *own_allocator;
    const size_t size = (std::max<size_t>(bytes, 1) + kAlign - 1) / kAlign * kAlign;
    s->data_ = a.alloc(a.user, size, kAlign);
    check(s->data_ != nullptr, "out of memory: {} bytes wanted, the allocator gave none", size);
    s->keep_alive_ =
        std::shared_ptr<void>(s->data_, [a, size](void* p) { a.free(a.user, p, size); });
    s->bytes_ = bytes;
    return s;
  }
  s->data_ = device_api(device).alloc(bytes, device.index);
  s->bytes_ = bytes;
  s->device_ = device;
  s->owned_ = true;
  return s;
}

std::shared_ptr<Storage> Storage::map(const std::filesystem::path& file, size_t offset,
                                      size_t bytes) {
  const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
  check(fd >= 0, "{}: cannot open: {}", file.string(), std::strerror(errno));
  struct stat info {};
  const bool stat_ok = ::fstat(fd, &info) == 0;
  const bool regular = stat_ok && S_ISREG(info.st_mode);
  const size_t size = regular ? static_cast<size_t>(info.st_size) : 0;
  if (!regular || offset > size || bytes > size - offset) {
    ::close(fd);
    check(regular, "{}: not a regular file", file.string());
    fail("{}: truncated: {} bytes at offset {} wanted, the file has {}", file.string(), bytes,
         offset, size);
  }
  std::shared_ptr<Storage> s(new Storage);
  s->bytes_ = bytes;
  s->writable_ = false;
  if (bytes == 0) {
    ::close(fd);
    return s;
  }
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t start = offset / page * page, length = bytes + (offset - start);
  void* base = ::mmap(nullptr, length, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(start));
  const int error = errno;
  ::close(fd);
  check(base != MAP_FAILED, "{}: cannot map {} bytes: {}", file.string(), bytes,
        std::strerror(error));
  s->keep_alive_ = std::shared_ptr<void>(base, [length](void* p) { ::munmap(p, length); });
  s->data_ = static_cast<char*>(base) + (offset - start);
  return s;
}

std::shared_ptr<Storage> Storage::borrow(void* data, size_t bytes, Device device,
                                         std::shared_ptr<void> keep_alive) {
  std::shared_ptr<Storage> s(new Storage);
  s->data_ = data;
  s->bytes_ = bytes;
  s->device_ = device;
  s->keep_alive_ = std::move(keep_alive);
  return s;
}

Storage::~Storage() {
  if (owned_) device_api(device_).free(data_, bytes_, device_.index);
}

}  // namespace omq
