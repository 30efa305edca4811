// See interrupt.h. The handler does nothing but what a handler may: it reads the clock, stores two
// numbers and writes a constant line.
#include "tools/interrupt.h"

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <ctime>
#include <initializer_list>

namespace omq::cli {
namespace {

volatile std::sig_atomic_t g_signal = 0;
std::atomic<int64_t> g_first{0};  // when it came, ms

// One signal may come twice: `timeout` sends it to the program and to its group.
constexpr int64_t kSameMs = 300;

int64_t now_ms() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000 + t.tv_nsec / 1000000;
}

extern "C" void omq_on_signal(int signal) {
  if (g_signal != 0) {
    if (now_ms() - g_first.load() < kSameMs) return;
    std::signal(signal, SIG_DFL);
    std::raise(signal);
    return;
  }
  g_first.store(now_ms());
  g_signal = signal;
  static constexpr char kText[] = "\nstopping after this step (once more: at once)\n";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kText, sizeof kText - 1);
}

}  // namespace

void catch_interrupts() {
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction now {};
    if (sigaction(signal, nullptr, &now) != 0 || now.sa_handler == SIG_IGN) continue;
    struct sigaction action {};
    action.sa_handler = omq_on_signal;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(signal, &action, nullptr);
  }
}

void check_interrupted() {
  if (g_signal != 0) throw Interrupted(g_signal);
}

}  // namespace omq::cli
