// parallel_for on our own small pool: the only threads of the library.
//
// Work is cut into chunks whose borders depend on n and grain alone, never on the number of
// threads, and a chunk is run by one thread from start to end: results are bit-identical on any
// number of threads. Workers stay awake for 1 ms for the next job, then sleep. A call from inside
// a chunk, or while another thread uses the pool, runs serially.
#pragma once

#include <cstdint>

namespace omq {

// Threads used by parallel_for, the caller included. Default: the CPUs this process may use
// (OMQ_THREADS overrides).
int num_threads();
void set_num_threads(int n);

namespace detail {
void parallel_run(int64_t chunks, void (*body)(void* context, int64_t chunk), void* context);
}

// Calls f(begin, end) for [0, n) cut into chunks of `grain` (the last one shorter). The first
// exception that f throws is thrown again here.
template <class F> void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t chunks = (n + grain - 1) / grain;
  if (chunks == 1) {
    f(int64_t{0}, n);
    return;
  }
  struct Context {
    F* f;
    int64_t n, grain;
  } context{&f, n, grain};
  detail::parallel_run(
      chunks,
      [](void* c, int64_t i) {
        auto* x = static_cast<Context*>(c);
        const int64_t begin = i * x->grain;
        const int64_t end = begin + x->grain < x->n ? begin + x->grain : x->n;
        (*x->f)(begin, end);
      },
      &context);
}

}  // namespace omq
