// Ctrl-C and SIGTERM as an exception between two steps, so that every destructor runs and nothing
// half-written stays behind. A second signal ends the process at once.
#pragma once

#include <exception>

namespace omq::cli {

// Not an Error: no frame is put in front of it, and no handler of errors takes it.
class Interrupted : public std::exception {
 public:
  explicit Interrupted(int signal) : signal_(signal) {}
  const char* what() const noexcept override { return "interrupted"; }
  int exit_code() const { return 128 + signal_; }  // as shells say it: 130 after Ctrl-C

 private:
  int signal_;
};

// From here on SIGINT, SIGTERM and SIGHUP (unless it was ignored before: nohup) only leave a mark.
void catch_interrupts();
// Throws Interrupted when there is such a mark.
void check_interrupted();

}  // namespace omq::cli
