// See interrupt.h. The handler does nothing but what a handler may: it stores a number and writes
// a constant line.
#include "tools/interrupt.h"

#include <unistd.h>

#include <csignal>
#include <initializer_list>

namespace omq::cli {
namespace {

volatile std::sig_atomic_t g_signal = 0;

extern "C" void omq_on_signal(int signal) {
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
    action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(signal, &action, nullptr);
  }
}

void check_interrupted() {
  if (g_signal != 0) throw Interrupted(g_signal);
}

}  // namespace omq::cli
