// The CPU's memory table. Freed blocks of 64 KiB and more are kept for the next request of the same
// size: a calibration step asks for the same few sizes again and again, and fresh pages from the
// kernel would cost more than the arithmetic.
#include "tensor/device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "tensor/error.h"

namespace omq {

std::string to_string(DeviceType t) { return t == DeviceType::CPU ? "cpu" : "cuda"; }
std::string to_string(Device d) {
  return d.type == DeviceType::CPU ? "cpu" : fmt::format("cuda:{}", d.index);
}

namespace {

constexpr size_t kAlign = 64;
constexpr size_t kReuseFrom = size_t{64} << 10;    // smaller blocks: malloc is fast enough
constexpr size_t kReuseLimit = size_t{512} << 20;  // idle bytes kept at most

struct BlockPool {
  std::mutex mutex;
  std::map<size_t, std::vector<void*>> idle;  // by exact size
  size_t idle_bytes = 0;
  MemoryUse use;
};
BlockPool& pool() {
  static auto* p = new BlockPool;  // never destroyed: tensors with static lifetime may outlive it
  return *p;
}

size_t rounded(size_t bytes) { return (std::max<size_t>(bytes, 1) + kAlign - 1) / kAlign * kAlign; }

void drop_idle(BlockPool& p) {
  for (auto& [size, blocks] : p.idle)
    for (void* b : blocks) std::free(b);
  p.idle.clear();
  p.idle_bytes = 0;
}

void* cpu_alloc(size_t bytes, int) {
  BlockPool& p = pool();
  const size_t size = rounded(bytes);
  std::lock_guard lock(p.mutex);
  p.use.now += size;
  p.use.peak = std::max(p.use.peak, p.use.now);
  if (size >= kReuseFrom) {
    if (auto it = p.idle.find(size); it != p.idle.end() && !it->second.empty()) {
      void* block = it->second.back();
      it->second.pop_back();
      p.idle_bytes -= size;
      return block;
    }
  }
  void* block = std::aligned_alloc(kAlign, size);
  if (!block) {
    drop_idle(p);
    block = std::aligned_alloc(kAlign, size);
  }
  if (!block) {
    p.use.now -= size;
    fail("out of memory: {} bytes wanted, {} bytes in use by tensors", bytes, p.use.now);
  }
  return block;
}

void cpu_free(void* block, size_t bytes, int) {
  BlockPool& p = pool();
  const size_t size = rounded(bytes);
  std::lock_guard lock(p.mutex);
  p.use.now -= size;
  if (size >= kReuseFrom && size <= kReuseLimit) {
    if (p.idle_bytes + size > kReuseLimit) drop_idle(p);
    p.idle[size].push_back(block);
    p.idle_bytes += size;
  } else {
    std::free(block);
  }
}

void cpu_copy(void* dst, Device dst_device, const void* src, Device src_device, size_t bytes) {
  check(dst_device.type == DeviceType::CPU && src_device.type == DeviceType::CPU,
        "copy: {} to {} needs the other device's table", to_string(src_device),
        to_string(dst_device));
  std::memcpy(dst, src, bytes);
}

void cpu_sync(int) {}
MemoryUse cpu_memory(int) { return cpu_memory_use(); }
void cpu_reset_peak(int) { reset_cpu_memory_peak(); }

// Calls are cheap here next to the work: there is nothing to gain from a recording.
void* cpu_record(const std::function<void()>&, int) { return nullptr; }
void cpu_replay(void*, int) {}
void cpu_forget(void*, int) {}

void* cpu_alloc_pinned(size_t bytes, int index) { return cpu_alloc(bytes, index); }
void cpu_free_pinned(void* p, size_t bytes, int index) { cpu_free(p, bytes, index); }
void cpu_copy_ahead(void* dst, const void* src, size_t bytes, int) { std::memcpy(dst, src, bytes); }
void cpu_join_ahead(int) {}
size_t cpu_memory_limit(int) { return 0; }
void cpu_set_memory_limit(size_t, int) {}
void cpu_set_plain_path(bool, int) {}

std::string cpu_describe(int) { return "host memory"; }

const DeviceApi kCpuApi{.alloc = cpu_alloc,
                        .free = cpu_free,
                        .copy = cpu_copy,
                        .sync = cpu_sync,
                        .memory = cpu_memory,
                        .reset_memory_peak = cpu_reset_peak,
                        .record = cpu_record,
                        .replay = cpu_replay,
                        .forget = cpu_forget,
                        .alloc_pinned = cpu_alloc_pinned,
                        .free_pinned = cpu_free_pinned,
                        .copy_ahead = cpu_copy_ahead,
                        .join_ahead = cpu_join_ahead,
                        .memory_limit = cpu_memory_limit,
                        .set_memory_limit = cpu_set_memory_limit,
                        .set_plain_path = cpu_set_plain_path,
                        .describe = cpu_describe};

}  // namespace

const DeviceApi& device_api(Device d) {
  if (d.type == DeviceType::CPU) return kCpuApi;
  const DeviceApi* api = cuda_device_api();
  check(api != nullptr,
        "device {} asked for, but this build has no CUDA back end; `make cuda` makes one that has",
        to_string(d));
  return *api;
}

MemoryUse cpu_memory_use() {
  BlockPool& p = pool();
  std::lock_guard lock(p.mutex);
  return p.use;
}

void reset_cpu_memory_peak() {
  BlockPool& p = pool();
  std::lock_guard lock(p.mutex);
  p.use.peak = p.use.now;
}

}  // namespace omq
