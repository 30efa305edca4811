// ThreadPool: threads of one's own behind parallel_for.
//
// A program needs none: parallel_for has one pool for the whole process. A library inside somebody
// else's program does, so that two models work at the same time, each with its own number of
// threads, and leave no thread behind when they are closed.
#pragma once

#include <memory>

namespace omq {

class ThreadPool {
 public:
  // threads: the caller's included; 0: as many as parallel_for would have by itself. They start at
  // the first job that needs them and end with the pool. Where the system gives fewer, fewer work.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

 private:
  friend class UsePool;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// While one lives, parallel_for, num_threads and set_num_threads of this thread mean that pool.
class [[nodiscard]] UsePool {
 public:
  explicit UsePool(ThreadPool& pool);
  ~UsePool();
  UsePool(const UsePool&) = delete;
  UsePool& operator=(const UsePool&) = delete;

 private:
  void* before_;
};

}  // namespace omq
