// The thread pool: every index once, the same chunks on any number of threads, exceptions, nesting,
// several callers.
#include "tensor/parallel.h"

#include <doctest/doctest.h>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tensor/thread_pool.h"

namespace omq {
namespace {

struct Threads {  // for one scope
  explicit Threads(int n) : before(num_threads()) { set_num_threads(n); }
  ~Threads() { set_num_threads(before); }
  int before;
};

using Chunks = std::set<std::pair<int64_t, int64_t>>;

Chunks chunks_of(int64_t n, int64_t grain) {
  std::mutex mutex;
  Chunks chunks;
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    std::lock_guard lock(mutex);
    chunks.insert({begin, end});
  });
  return chunks;
}

}  // namespace

TEST_CASE("chunks depend on size and grain alone") {
  for (int threads : {1, 2, 5}) {
    const Threads scope(threads);
    CHECK(num_threads() == threads);
    CHECK(chunks_of(10, 4) == Chunks{{0, 4}, {4, 8}, {8, 10}});
    CHECK(chunks_of(8, 4) == Chunks{{0, 4}, {4, 8}});
    CHECK(chunks_of(3, 100) == Chunks{{0, 3}});
    CHECK(chunks_of(3, 0) == Chunks{{0, 1}, {1, 2}, {2, 3}});
    CHECK(chunks_of(0, 4).empty());
    CHECK(chunks_of(-5, 4).empty());
  }
}

TEST_CASE("every index is visited once, many jobs in a row") {
  for (int threads : {1, 2, 5}) {
    const Threads scope(threads);
    std::vector<std::atomic<int>> seen(997);
    for (int round = 0; round < 300; ++round)
      parallel_for(997, 10, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) seen[static_cast<size_t>(i)]++;
      });
    for (const auto& count : seen)
      if (count != 300) FAIL_CHECK("visited " << count << " times");
  }
}

TEST_CASE("an exception reaches the caller, and the pool still works") {
  for (int threads : {1, 2, 5}) {
    const Threads scope(threads);
    for (int round = 0; round < 20; ++round) {
      CHECK_THROWS_WITH_AS(parallel_for(100, 1,
                                        [](int64_t begin, int64_t) {
                                          if (begin == 37) throw std::runtime_error("chunk 37");
                                        }),
                           "chunk 37", std::runtime_error);
      std::atomic<int64_t> sum{0};
      parallel_for(100, 1, [&](int64_t begin, int64_t) { sum += begin; });
      CHECK(sum == 4950);
    }
  }
}

TEST_CASE("a call from inside a chunk runs there, serially") {
  for (int threads : {1, 2, 5}) {
    const Threads scope(threads);
    std::atomic<int> visits{0}, strangers{0};
    parallel_for(8, 1, [&](int64_t, int64_t) {
      const auto self = std::this_thread::get_id();
      parallel_for(8, 1, [&](int64_t, int64_t) {
        visits++;
        if (std::this_thread::get_id() != self) strangers++;
      });
    });
    CHECK(visits == 64);
    CHECK(strangers == 0);
  }
}

TEST_CASE("an exception inside a nested call passes through both") {
  for (int threads : {1, 3}) {
    const Threads scope(threads);
    CHECK_THROWS_AS(parallel_for(4, 1,
                                 [](int64_t, int64_t) {
                                   parallel_for(4, 1, [](int64_t b, int64_t) {
                                     if (b == 3) throw std::logic_error("inner");
                                   });
                                 }),
                    std::logic_error);
    CHECK(chunks_of(4, 2) == Chunks{{0, 2}, {2, 4}});
  }
}

TEST_CASE("several threads may call at once") {
  const Threads scope(2);
  std::vector<std::thread> callers;
  std::atomic<int64_t> total{0};
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round)
        parallel_for(50, 3, [&](int64_t begin, int64_t end) { total += end - begin; });
    });
  for (auto& c : callers) c.join();
  CHECK(total == 4 * 200 * 50);
}

TEST_CASE("the number of threads can change between jobs") {
  const Threads scope(1);
  for (int n : {3, 1, 5, 2, 0, -4}) {
    set_num_threads(n);
    CHECK(num_threads() == std::max(1, n));
    CHECK(chunks_of(10, 4).size() == 3);
  }
}

TEST_CASE("a pool of one's own, for as long as it is used, on this thread alone") {
  const Threads scope(2);
  ThreadPool three(3), one(1);
  CHECK(three.threads() == 3);
  CHECK(ThreadPool().threads() >= 1);
  {
    const UsePool use(three);
    CHECK(num_threads() == 3);
    CHECK(chunks_of(10, 4).size() == 3);
    {
      const UsePool inner(one);
      CHECK(num_threads() == 1);
    }
    set_num_threads(4);
    CHECK(num_threads() == 4);
    int elsewhere = 0;
    std::thread([&] { elsewhere = num_threads(); }).join();
    CHECK(elsewhere == 2);
  }
  CHECK(three.threads() == 4);
  CHECK(num_threads() == 2);
}

TEST_CASE("two callers with a pool each run side by side, nested calls and all") {
  std::vector<std::thread> callers;
  std::atomic<int64_t> total{0};
  std::atomic<int> wrong{0};
  for (int c = 0; c < 2; ++c)
    callers.emplace_back([&, c] {
      ThreadPool pool(2 + c);
      const UsePool use(pool);
      for (int round = 0; round < 300; ++round)
        parallel_for(50, 3, [&](int64_t begin, int64_t end) {
          parallel_for(end - begin, 1, [&](int64_t, int64_t) { total++; });
          if (num_threads() != 2 + c) wrong++;  // a worker is of its pool
        });
    });
  for (auto& c : callers) c.join();
  CHECK(total == 2 * 300 * 50);
  CHECK(wrong == 0);
}

}  // namespace omq
