// A persistent team of threads that runs one function at a time, with barriers and work sharing
// inside it: a whole decode step is one parallel region.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace pocketslm {

class ThreadPool {
 public:
  // The calling thread is member 0. With `pin`, members are bound to the fastest CPUs.
  ThreadPool(unsigned threads, bool pin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  unsigned size() const { return size_; }

  // Runs f(member) on every member and returns when all are done.
  template <typename F>
  void run(F& f) {
    run_erased([](void* context, unsigned member) { (*static_cast<F*>(context))(member); }, &f);
  }

  // Inside run(): all members must call it. Those that wait call idle() over and over.
  template <typename F>
  void barrier(F&& idle) {
    if (size_ == 1) return;
    const unsigned generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (unsigned spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      idle();
      relax(spins);
    }
  }

  // Inside run(): calls f(begin, end) for chunks of [0, total) until none are left, and ends with a
  // barrier. A member takes chunks of its own contiguous share first, so that it streams through
  // memory, and then helps those that are behind.
  template <typename F, typename Idle>
  void share(unsigned member, size_t total, size_t chunk, F&& f, Idle&& idle) {
    if (size_ == 1) {
      f(size_t{0}, total);
      return;
    }
    Slot& own = slots_[member];
    const unsigned bank = own.phase & 1;
    ++own.phase;
    // Nobody touches the other bank now: its phase ended with the last barrier.
    own.taken[bank ^ 1].store(0, std::memory_order_relaxed);
    for (unsigned i = 0; i < size_; ++i) {
      const unsigned owner = (member + i) % size_;
      const size_t first = total * owner / size_, last = total * (owner + 1) / size_;
      for (;;) {
        const size_t begin =
            first + slots_[owner].taken[bank].fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= last) break;
        f(begin, begin + chunk < last ? begin + chunk : last);
      }
    }
    barrier(idle);
  }

 private:
  using Erased = void (*)(void*, unsigned);
  struct alignas(64) Slot {
    std::atomic<size_t> taken[2] = {{0}, {0}};
    unsigned phase = 0;
  };

  static void relax(unsigned spins);
  void run_erased(Erased function, void* context);
  void work(unsigned member, int cpu);

  const unsigned size_;
  std::vector<Slot> slots_;
  std::vector<std::thread> workers_;

  alignas(64) std::atomic<unsigned> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
  alignas(64) std::atomic<uint64_t> job_{0};
  std::atomic<bool> stop_{false};
  Erased function_ = nullptr;
  void* context_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// CPUs this process may use, fastest first, by the kernel's capacity or maximum frequency.
std::vector<int> cpus_by_speed();

}  // namespace pocketslm
