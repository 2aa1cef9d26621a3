// Where the time of a session goes, operator by operator.
#pragma once

#include <chrono>
#include <cstdint>

#include "pocketslm.h"

namespace pocketslm {

// Marks are set by one thread, at the end of each operator: the time since the mark before is its.
class OperatorClock {
 public:
  void set(bool on) {
    on_ = on;
    if (on) times_ = {};
  }
  void start(size_t tokens) {
    if (!on_) return;
    ++times_.calls;
    times_.tokens += tokens;
    last_ = Clock::now();
  }
  void mark(uint64_t pslm_times::* counter) {
    if (!on_) return;
    const Clock::time_point now = Clock::now();
    times_.*counter += static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count());
    last_ = now;
  }
  const pslm_times& times() const { return times_; }

 private:
  using Clock = std::chrono::steady_clock;
  bool on_ = false;
  Clock::time_point last_;
  pslm_times times_{};
};

}  // namespace pocketslm
