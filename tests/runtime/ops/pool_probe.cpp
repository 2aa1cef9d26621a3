// Threads of unequal speed in one pool.
#include <algorithm>
#include <chrono>
#include <vector>

#include "thread_pool.h"

using namespace pocketslm;

namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

void spin(size_t turns) {
  for (size_t i = 0; i < turns; ++i) __asm__ volatile("" ::: "memory");
}

// One phase of `units`, of which member i takes turns[i] turns for each; returns the part of the phase
// that its members waited for the last one.
double phase(ThreadPool& pool, size_t units, size_t chunk, const uint32_t* turns,
             std::vector<uint64_t>& work) {
  const auto begin = Clock::now();
  std::vector<Clock::time_point> finished(pool.size(), begin);
  auto region = [&](unsigned member) {
    pool.share(
        member, units, chunk,
        [&](size_t first, size_t last) {
          spin((last - first) * turns[member]);
          work[member] += last - first;
          finished[member] = Clock::now();
        },
        [] {});
  };
  pool.run(region);
  const auto end = *std::max_element(finished.begin(), finished.end());
  double waited = 0;
  for (const auto& at : finished) waited += seconds(end - at);
  return waited / (seconds(end - begin) * static_cast<double>(pool.size()));
}

// The median, with shares as they are and nobody helping another.
double waiting(ThreadPool& pool, size_t units, const uint32_t* turns) {
  std::vector<double> parts;
  for (int i = 0; i < 41; ++i) {
    std::vector<uint64_t> work(pool.size());
    parts.push_back(phase(pool, units, units, turns, work));
  }
  std::nth_element(parts.begin(), parts.begin() + 20, parts.end());
  return parts[20];
}

}  // namespace

// share: the part of the work that is member 1's in the end; before and after: what two members wait
// with equal shares, and with these.
extern "C" __attribute__((visibility("default"))) void probe_pool(const uint32_t* turns,
                                                                  double* share, double* before,
                                                                  double* after) {
  constexpr size_t kUnits = 128;
  ThreadPool pool(2, false);
  *before = waiting(pool, kUnits, turns);
  for (int i = 0; i < 300; ++i) {
    std::vector<uint64_t> work(2);
    phase(pool, kUnits, 1, turns, work);
    pool.balance(work);
  }
  const auto [first, last] = pool.share_of(1, 1000);
  *share = static_cast<double>(last - first) / 1000;
  *after = waiting(pool, kUnits, turns);
}
