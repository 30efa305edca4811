// main() of every test program: doctest's, with one thread unless OMQ_THREADS says otherwise.
//
// Test cases whose name begins with "slow:" are the slow tier (see cmake/Tests.cmake).
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdlib>

int main(int argc, char** argv) {
  setenv("OMQ_THREADS", "1", /*overwrite=*/0);  // read once by the pool, before any test runs
  doctest::Context context;
  context.setOption("no-version", true);
  context.applyCommandLine(argc, argv);
  return context.run();
}
