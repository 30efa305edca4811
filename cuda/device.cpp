// The CUDA memory table: one compute stream per device, allocation through the device's
// stream-ordered pool (which keeps what is freed), copies, and the errors of a machine without a
// usable GPU.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/stream.h"
#include "cuda/weights_ahead.h"
#include "tensor/device.h"
#include "tensor/error.h"

namespace omq {
namespace cuda {
namespace {

bool set(const char* variable, bool otherwise) {
  const char* text = std::getenv(variable);
  return text && *text ? std::strcmp(text, "0") != 0 : otherwise;
}

struct State {
  DeviceInfo info, whole_info;                      // as launches see the device; as it is
  cudaStream_t stream = nullptr, copies = nullptr;  // copies: of copy_ahead
  cudaEvent_t reached = nullptr, copied = nullptr;  // where copies may begin; where they are done
  cudaMemPool_t pool = nullptr;
  std::mutex mutex;  // of use
  MemoryUse use;
  size_t limit = SIZE_MAX;        // of use.now
  WeightsAhead* ahead = nullptr;  // of the recording under way
};

constexpr int kMaxDevices = 128;  // Device::index is 8 bits wide
thread_local int current = -1;    // this thread's current device, so that it is set only on change

std::string version_text(int v) { return fmt::format("{}.{}", v / 1000, v % 1000 / 10); }

// Devices of this machine; throws when there is none that can be used.
int device_count(int wanted) {
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) cudaGetLastError();
  check(driver != 0, "cuda:{}: no CUDA device found (no NVIDIA driver on this machine)", wanted);
  check(status != cudaErrorInsufficientDriver,
        "cuda:{}: the NVIDIA driver is too old: it runs CUDA {}, this build needs {}", wanted,
        version_text(driver), version_text(CUDART_VERSION));
  check(status == cudaSuccess || status == cudaErrorNoDevice, "cuda:{}: {} (driver for CUDA {})",
        wanted, cudaGetErrorString(status), version_text(driver));
  check(count > 0, "cuda:{}: no CUDA device found (driver for CUDA {})", wanted,
        version_text(driver));
  return count;
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  OMQ_CUDA(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

std::unique_ptr<State> open_device(int index) {
  const int count = device_count(index);
  check(index >= 0 && index < count, "cuda:{}: this machine has {} CUDA device{} (cuda:0{})", index,
        count, count == 1 ? "" : "s", count == 1 ? "" : fmt::format(" … cuda:{}", count - 1));
  auto s = std::make_unique<State>();
  s->info.index = index;
  s->info.major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  s->info.minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  check(s->info.major >= 8, "cuda:{}: compute capability {}.{}; this build needs 8.0 or newer",
        index, s->info.major, s->info.minor);
  s->info.sms = attribute(cudaDevAttrMultiProcessorCount, index);
  s->info.l2_bytes = static_cast<size_t>(attribute(cudaDevAttrL2CacheSize, index));
  s->info.shared_optin =
      static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  OMQ_CUDA(cudaSetDevice(index));
  current = index;
  // A device newer than this build's architectures runs the oldest's code, translated: clusters and
  // chained launches are not in it.
  if (const int code = compiled_for(); code > 0 && code < 10 * s->info.major)
    s->info.major = code / 10, s->info.minor = code % 10;
  s->whole_info = s->info;
  check(attribute(cudaDevAttrMemoryPoolsSupported, index) != 0,
        "cuda:{}: no stream-ordered allocation; the driver is too old or a restricted one", index);
  OMQ_CUDA(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
  OMQ_CUDA(cudaStreamCreateWithFlags(&s->copies, cudaStreamNonBlocking));
  for (cudaEvent_t* event : {&s->reached, &s->copied})
    OMQ_CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  OMQ_CUDA(cudaDeviceGetDefaultMemPool(&s->pool, index));
  uint64_t keep = UINT64_MAX;  // freed memory stays with the process until it is trimmed
  OMQ_CUDA(cudaMemPoolSetAttribute(s->pool, cudaMemPoolAttrReleaseThreshold, &keep));
  return s;
}

// The device's state, opened at first use; the device becomes this thread's current one.
State& use(int index) {
  static std::mutex mutex;
  static auto* states = new std::array<std::unique_ptr<State>, kMaxDevices>;  // never destroyed
  check(index >= 0 && index < kMaxDevices, "cuda:{}: no such device", index);
  std::unique_ptr<State>& slot = (*states)[static_cast<size_t>(index)];
  {
    std::lock_guard lock(mutex);
    if (!slot) slot = open_device(index);
  }
  if (current != index) {
    OMQ_CUDA(cudaSetDevice(index));
    current = index;
  }
  return *slot;
}

void* cuda_alloc(size_t bytes, int index) {
  State& s = use(index);
  void* block = nullptr;
  const size_t size = std::max<size_t>(bytes, 1);
  {
    std::lock_guard lock(s.mutex);
    check(bytes <= s.limit && s.use.now <= s.limit - bytes,
          "cuda:{}: the memory limit of {} bytes is reached: {} in use by tensors, {} more wanted",
          index, s.limit, s.use.now, bytes);
  }
  cudaError_t status = cudaMallocAsync(&block, size, s.stream);
  if (status == cudaErrorMemoryAllocation) {  // blocks kept for other sizes may stand in the way
    cudaGetLastError();
    OMQ_CUDA(cudaStreamSynchronize(s.stream));
    OMQ_CUDA(cudaMemPoolTrimTo(s.pool, 0));
    status = cudaMallocAsync(&block, size, s.stream);
  }
  std::lock_guard lock(s.mutex);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free_bytes = 0, total = 0;
    cudaMemGetInfo(&free_bytes, &total);
    fail("cuda:{}: out of memory: {} bytes wanted, {} in use by tensors, {} of {} free", index,
         bytes, s.use.now, free_bytes, total);
  }
  OMQ_CUDA(status);
  s.use.now += bytes;
  s.use.peak = std::max(s.use.peak, s.use.now);
  return block;
}

// Called by destructors, also while the process ends and the driver is gone: it never throws.
void cuda_free(void* block, size_t bytes, int index) {
  if (!block) return;
  try {
    State& s = use(index);
    if (cudaFreeAsync(block, s.stream) != cudaSuccess) cudaGetLastError();
    std::lock_guard lock(s.mutex);
    s.use.now -= bytes;
  } catch (const Error&) {
  }
}

// Page-locked host memory is read by the device after the call returns, pageable memory is not.
bool pinned(const void* p) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, p) != cudaSuccess) {
    cudaGetLastError();
    return true;  // unknown: wait
  }
  return attributes.type != cudaMemoryTypeUnregistered;
}

void cuda_copy(void* dst, Device dst_device, const void* src, Device src_device, size_t bytes) {
  if (bytes == 0) return;
  const bool to_gpu = dst_device.type == DeviceType::CUDA,
             from_gpu = src_device.type == DeviceType::CUDA;
  if (!to_gpu && !from_gpu) {
    std::memcpy(dst, src, bytes);
  } else if (to_gpu && from_gpu && dst_device.index != src_device.index) {
    State& from = use(src_device.index);
    OMQ_CUDA(cudaStreamSynchronize(from.stream));
    State& to = use(dst_device.index);
    OMQ_CUDA(cudaMemcpyPeerAsync(dst, dst_device.index, src, src_device.index, bytes, to.stream));
    OMQ_CUDA(cudaStreamSynchronize(to.stream));  // the source may be freed on its own stream next
  } else {
    State& s = use(to_gpu ? dst_device.index : src_device.index);
    OMQ_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, s.stream));
    if (!to_gpu || (!from_gpu && pinned(src))) OMQ_CUDA(cudaStreamSynchronize(s.stream));
  }
}

void cuda_sync(int index) { OMQ_CUDA(cudaStreamSynchronize(use(index).stream)); }

MemoryUse cuda_memory(int index) {
  State& s = use(index);
  uint64_t pool = 0, graphs = 0;  // recorded work has memory of its own
  OMQ_CUDA(cudaMemPoolGetAttribute(s.pool, cudaMemPoolAttrReservedMemHigh, &pool));
  OMQ_CUDA(cudaDeviceGetGraphMemAttribute(index, cudaGraphMemAttrReservedMemHigh, &graphs));
  std::lock_guard lock(s.mutex);
  s.use.reserved_peak = pool + graphs;
  return s.use;
}

void cuda_reset_peak(int index) {
  State& s = use(index);
  uint64_t zero = 0;
  OMQ_CUDA(cudaMemPoolSetAttribute(s.pool, cudaMemPoolAttrReservedMemHigh, &zero));
  OMQ_CUDA(cudaDeviceSetGraphMemAttribute(index, cudaGraphMemAttrReservedMemHigh, &zero));
  std::lock_guard lock(s.mutex);
  s.use.peak = s.use.now;
}

size_t cuda_memory_limit(int index) {
  State& s = use(index);
  size_t free_bytes = 0, total = 0;
  OMQ_CUDA(cudaMemGetInfo(&free_bytes, &total));
  std::lock_guard lock(s.mutex);
  return std::min(s.limit, free_bytes + s.use.now);
}

void cuda_set_memory_limit(size_t bytes, int index) {
  State& s = use(index);
  std::lock_guard lock(s.mutex);
  s.limit = bytes;
}

struct GraphDeleter {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using Graph = std::unique_ptr<CUgraph_st, GraphDeleter>;

// What body puts on the stream.
Graph capture(State& s, const std::function<void()>& body) {
  cudaGraph_t graph = nullptr;
  OMQ_CUDA(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeRelaxed));
  try {
    body();
  } catch (...) {
    cudaStreamEndCapture(s.stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  OMQ_CUDA(cudaStreamEndCapture(s.stream, &graph));
  return Graph(graph);
}

struct Recording {
  cudaGraphExec_t executable = nullptr;
  std::unique_ptr<WeightsAhead> ahead;  // null: it asks for nothing
};

// The stream's work as a graph. What body allocates and frees becomes part of it, with addresses of
// its own; so body must not free what was allocated before, nor keep what it allocates. It may be
// called twice.
void* cuda_record(const std::function<void()>& body, int index) {
  static const bool wanted =
      set("OMQ_GRAPH", true) && !set("OMQ_SYNC", false) && !set("OMQ_PROFILE", false);
  if (!wanted) return nullptr;
  State& s = use(index);
  auto recording = std::make_unique<Recording>();
  auto ahead = std::make_unique<WeightsAhead>(s.info.sms);
  struct Listening {
    WeightsAhead*& place;
    ~Listening() { place = nullptr; }
  } listening{s.ahead};
  if (s.info.major >= 9) s.ahead = ahead.get();
  Graph graph = capture(s, body);
  if (ahead->has_stages()) {
    graph = capture(s, [&] {
      ahead->begin(s.stream);
      body();
      ahead->end(s.stream);
    });
    recording->ahead = std::move(ahead);
  }
  OMQ_CUDA(cudaGraphInstantiate(&recording->executable, graph.get(), 0));
  // What the same work used when it ran unrecorded would lie idle beside the recording's own.
  OMQ_CUDA(cudaStreamSynchronize(s.stream));
  OMQ_CUDA(cudaMemPoolTrimTo(s.pool, 0));
  return recording.release();
}

void cuda_replay(void* recorded, int index) {
  OMQ_CUDA(cudaGraphLaunch(static_cast<Recording*>(recorded)->executable, use(index).stream));
}

void cuda_forget(void* recorded, int index) {
  const std::unique_ptr<Recording> recording(static_cast<Recording*>(recorded));
  try {
    OMQ_CUDA(cudaStreamSynchronize(use(index).stream));
    OMQ_CUDA(cudaGraphExecDestroy(recording->executable));
    OMQ_CUDA(cudaDeviceGraphMemTrim(index));
  } catch (const Error&) {  // called by destructors
  }
}

void* cuda_alloc_pinned(size_t bytes, int index) {
  use(index);
  void* block = nullptr;
  const cudaError_t status =
      cudaHostAlloc(&block, std::max<size_t>(bytes, 1), cudaHostAllocPortable);
  if (status != cudaSuccess) cudaGetLastError();
  check(status == cudaSuccess, "{} bytes of page-locked host memory: {}", bytes,
        cudaGetErrorString(status));
  return block;
}

void cuda_free_pinned(void* p, size_t, int index) {
  try {
    use(index);
    if (p && cudaFreeHost(p) != cudaSuccess) cudaGetLastError();
  } catch (const Error&) {  // called by destructors
  }
}

void cuda_copy_ahead(void* dst, const void* src, size_t bytes, int index) {
  State& s = use(index);
  OMQ_CUDA(cudaEventRecord(s.reached, s.stream));
  OMQ_CUDA(cudaStreamWaitEvent(s.copies, s.reached, 0));
  OMQ_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, s.copies));
  OMQ_CUDA(cudaEventRecord(s.copied, s.copies));
}

void cuda_join_ahead(int index) {
  State& s = use(index);
  OMQ_CUDA(cudaStreamWaitEvent(s.stream, s.copied, 0));
}

std::string cuda_describe(int index) {
  use(index);
  cudaDeviceProp properties{};
  OMQ_CUDA(cudaGetDeviceProperties(&properties, index));
  return fmt::format("{}, {:.1f} GiB", properties.name,
                     static_cast<double>(properties.totalGlobalMem) / double{1 << 30});
}

void cuda_set_plain_path(bool on, int index) {
  State& s = use(index);
  OMQ_CUDA(cudaStreamSynchronize(s.stream));
  s.info = s.whole_info;
  if (!on) return;
  constexpr size_t kPlainShared = size_t{99} << 10;
  s.info.major = 8, s.info.minor = 6;
  s.info.shared_optin = std::min(s.info.shared_optin, kPlainShared);
}

const DeviceApi kCudaApi{.alloc = cuda_alloc,
                         .free = cuda_free,
                         .copy = cuda_copy,
                         .sync = cuda_sync,
                         .memory = cuda_memory,
                         .reset_memory_peak = cuda_reset_peak,
                         .record = cuda_record,
                         .replay = cuda_replay,
                         .forget = cuda_forget,
                         .alloc_pinned = cuda_alloc_pinned,
                         .free_pinned = cuda_free_pinned,
                         .copy_ahead = cuda_copy_ahead,
                         .join_ahead = cuda_join_ahead,
                         .memory_limit = cuda_memory_limit,
                         .set_memory_limit = cuda_set_memory_limit,
                         .set_plain_path = cuda_set_plain_path,
                         .describe = cuda_describe};

}  // namespace

const DeviceInfo& device_info(int index) { return use(index).info; }
cudaStream_t stream_of(int index) { return use(index).stream; }
WeightsAhead* weights_ahead(int index) { return use(index).ahead; }

void check_status(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the next call starts clean, unless the error is one that stays
  fail("{} failed: {} ({}) at {}:{}", call, cudaGetErrorString(status), cudaGetErrorName(status),
       file, line);
}

namespace {

// Times of launches by name, for OMQ_PROFILE=1.
struct Profile {
  struct Row {
    double ms = 0;
    int64_t calls = 0;
  };
  cudaEvent_t start = nullptr, stop = nullptr;
  std::map<std::string, Row> rows;

  Profile() {
    OMQ_CUDA(cudaEventCreate(&start));
    OMQ_CUDA(cudaEventCreate(&stop));
  }
  void end(const char* op, cudaStream_t stream) {
    float ms = 0;
    OMQ_CUDA(cudaEventRecord(stop, stream));
    OMQ_CUDA(cudaEventSynchronize(stop));
    OMQ_CUDA(cudaEventElapsedTime(&ms, start, stop));
    Row& row = rows[op];
    row.ms += static_cast<double>(ms);
    ++row.calls;
  }
  void print() const {
    std::vector<std::pair<std::string, Row>> sorted(rows.begin(), rows.end());
    std::sort(sorted.begin(), sorted.end(),
              [](const auto& a, const auto& b) { return a.second.ms > b.second.ms; });
    for (const auto& [op, row] : sorted)
      fmt::print(stderr, "profile: {:24} {:10.2f} ms in {:7} launches\n", op, row.ms, row.calls);
  }
};

Profile* profile() {
  static Profile* const p = [] {
    if (!set("OMQ_PROFILE", false)) return static_cast<Profile*>(nullptr);
    auto* made = new Profile;
    static Profile* shown = made;
    std::atexit([] { shown->print(); });
    return made;
  }();
  return p;
}

}  // namespace

void begin_launch(cudaStream_t stream) {
  if (Profile* p = profile()) OMQ_CUDA(cudaEventRecord(p->start, stream));
}

void check_launch(const char* op, cudaStream_t stream) {
  static const bool wait = set("OMQ_SYNC", false);
  cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess && wait) status = cudaStreamSynchronize(stream);
  if (Profile* p = profile(); p && status == cudaSuccess) p->end(op, stream);
  if (status == cudaSuccess) return;
  cudaGetLastError();
  fail("{}: CUDA kernel failed: {} ({}){}", op, cudaGetErrorString(status),
       cudaGetErrorName(status), wait ? "" : "; OMQ_SYNC=1 finds the kernel that caused it");
}

}  // namespace cuda

const DeviceApi* cuda_device_api() { return &cuda::kCudaApi; }

}  // namespace omq
