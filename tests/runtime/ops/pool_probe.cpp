// Two threads of unequal speed in one pool. Time is simulated, so that a busy machine changes nothing:
// a thread that is ahead of the other in it waits before it takes more work.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "thread_pool.h"

using namespace pocketslm;

namespace {

struct Clock {
  std::atomic<uint64_t> time{0};
  std::atomic<bool> done{false};
};

// One phase of `units`, of which member i takes cost[i] for each, in chunks. Returns the part of the
// phase that the members wait for the last one.
double phase(ThreadPool& pool, size_t units, size_t chunk, const uint32_t* cost,
             std::vector<uint64_t>& work) {
  Clock clocks[2];
  auto region = [&](unsigned member) {
    Clock &own = clocks[member], &other = clocks[1 - member];
    pool.barrier([] {});
    pool.share(
        member, units, chunk,
        [&](size_t first, size_t last) {
          work[member] += last - first;
          own.time += (last - first) * cost[member];
          while (own.time > other.time && !other.done) std::this_thread::yield();
        },
        [&] { own.done = true; });
  };
  pool.run(region);
  const uint64_t a = clocks[0].time, b = clocks[1].time;
  return static_cast<double>(std::max(a, b) - std::min(a, b)) / (2.0 * std::max(a, b));
}

}  // namespace

// share: the part of the work that is member 1's in the end; before and after: what two members wait
// with equal shares, and with these, where nobody helps another.
extern "C" __attribute__((visibility("default"))) void probe_pool(const uint32_t* cost,
                                                                  double* share, double* before,
                                                                  double* after) {
  constexpr size_t kUnits = 48;
  ThreadPool pool(2, false);
  std::vector<uint64_t> ignored(2);
  *before = phase(pool, kUnits, kUnits, cost, ignored);
  for (int i = 0; i < 60; ++i) {
    std::vector<uint64_t> work(2);
    phase(pool, kUnits, 1, cost, work);
    pool.balance(work);
  }
  const auto [first, last] = pool.share_of(1, 1000);
  *share = static_cast<double>(last - first) / 1000;
  *after = phase(pool, kUnits, kUnits, cost, ignored);
}
