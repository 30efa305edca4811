// The thread pool behind parallel_for. One job at a time; chunks are dealt by an atomic counter,
// which decides only who runs a chunk, never what the chunk is.
#include "tensor/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace omq {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int default_threads() {
  if (const char* text = std::getenv("OMQ_THREADS")) {
    const int n = std::atoi(text);
    if (n > 0) return std::min(n, 1024);
  }
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

struct Job {
  int64_t chunks = 0;
  void (*body)(void*, int64_t) = nullptr;
  void* context = nullptr;
};

class Pool {
 public:
  ~Pool() { stop(); }

  int threads() {
    if (count_ == 0) count_ = default_threads();
    return count_;
  }

  void set_threads(int n) {
    std::lock_guard busy(run_mutex_);
    stop();
    count_ = std::max(1, n);
  }

  void run(const Job& job) {
    if (inside_) return run_alone(job);
    std::unique_lock busy(run_mutex_, std::try_to_lock);
    if (!busy.owns_lock() || threads() == 1) return run_alone(job);
    start();
    {
      std::lock_guard lock(mutex_);
      job_ = job;
      next_.store(0, std::memory_order_relaxed);
      error_ = nullptr;
      open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work();
    {
      std::lock_guard lock(mutex_);
      open_ = false;  // a worker that wakes only now is not waited for
    }
    while (working_.load(std::memory_order_acquire) != 0) relax();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static void run_alone(const Job& job) {
    const bool before = std::exchange(inside_, true);
    try {
      for (int64_t i = 0; i < job.chunks; ++i) job.body(job.context, i);
    } catch (...) {
      inside_ = before;
      throw;
    }
    inside_ = before;
  }

  void work() {
    inside_ = true;
    try {
      for (;;) {
        const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
        if (i >= job_.chunks) break;
        job_.body(job_.context, i);
      }
    } catch (...) {
      next_.store(job_.chunks, std::memory_order_relaxed);
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_ = false;
  }

  void start() {
    while (static_cast<int>(workers_.size()) < count_ - 1) {
      const uint64_t seen = generation_.load();
      workers_.emplace_back([this, seen] { loop(seen); });
    }
  }

  void loop(uint64_t seen) {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      while (generation_.load(std::memory_order_acquire) == seen &&
             std::chrono::steady_clock::now() < until)
        relax();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_.load()) return;
      {
        std::lock_guard lock(mutex_);
        if (!open_) continue;
        working_.fetch_add(1, std::memory_order_relaxed);
      }
      work();
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
    workers_.clear();
    stopping_ = false;
  }

  static thread_local bool inside_;
  int count_ = 0;
  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  Job job_;
  std::exception_ptr error_;
  bool open_ = false;  // guarded by mutex_: the present job still takes workers
  std::atomic<int64_t> next_{0};
  std::atomic<int> working_{0};
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> stopping_{false};
};
thread_local bool Pool::inside_ = false;

Pool& pool() {
  static Pool p;
  return p;
}

}  // namespace

int num_threads() { return pool().threads(); }
void set_num_threads(int n) { pool().set_threads(n); }

namespace detail {
void parallel_run(int64_t chunks, void (*body)(void*, int64_t), void* context) {
  pool().run({chunks, body, context});
}
}  // namespace detail

}  // namespace omq
