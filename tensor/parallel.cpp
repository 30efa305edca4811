// The thread pools behind parallel_for. One job at a time in each; chunks are dealt by an atomic
// counter, which decides only who runs a chunk, never what the chunk is.
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
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "tensor/thread_pool.h"

namespace omq {
namespace {

// How long a worker stays awake for the next job: to wake a sleeping one costs about 0.1 ms on a
// virtual machine, 1.5 to 3 % of a step of learning on two cores, whose jobs follow each other
// within a millisecond. At first it only spins, then it lets others have the processor.
constexpr auto kSpin = std::chrono::microseconds(50), kAwake = std::chrono::microseconds(1000);

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

class Pool;
thread_local Pool* own_pool = nullptr;  // null: the process's

class Pool {
 public:
  explicit Pool(int threads) : count_(threads > 0 ? threads : default_threads()) {}
  ~Pool() { stop(); }

  int threads() const { return count_.load(std::memory_order_relaxed); }

  void set_threads(int n) {
    std::lock_guard busy(run_mutex_);
    stop();
    count_.store(std::max(1, n));
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
    while (static_cast<int>(workers_.size()) < threads() - 1) {
      const uint64_t seen = generation_.load();
      try {
        workers_.emplace_back([this, seen] { loop(seen); });
      } catch (const std::system_error&) {  // no more threads here: those that there are will do
        count_.store(static_cast<int>(workers_.size()) + 1);
      }
    }
  }

  // Until there is a job behind `seen`, or for kAwake.
  void stay_awake(uint64_t seen) const {
    const auto start = std::chrono::steady_clock::now();
    for (auto waited = start - start;
         waited < kAwake && generation_.load(std::memory_order_acquire) == seen;
         waited = std::chrono::steady_clock::now() - start)
      if (waited < kSpin)
        relax();
      else
        sched_yield();
  }

  void loop(uint64_t seen) {
    own_pool = this;
    for (;;) {
      stay_awake(seen);
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
  std::atomic<int> count_;
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
  if (own_pool) return *own_pool;
  static Pool p(0);
  return p;
}

}  // namespace

struct ThreadPool::Impl {
  explicit Impl(int threads) : pool(threads) {}
  Pool pool;
};
ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>(threads)) {}
ThreadPool::~ThreadPool() = default;
int ThreadPool::threads() const { return impl_->pool.threads(); }

UsePool::UsePool(ThreadPool& pool) : before_(std::exchange(own_pool, &pool.impl_->pool)) {}
UsePool::~UsePool() { own_pool = static_cast<Pool*>(before_); }

int num_threads() { return pool().threads(); }
void set_num_threads(int n) { pool().set_threads(n); }

namespace detail {
void parallel_run(int64_t chunks, void (*body)(void*, int64_t), void* context) {
  pool().run({chunks, body, context});
}
}  // namespace detail

}  // namespace omq
