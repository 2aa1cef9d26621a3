// A persistent team of threads that runs one function at a time, with barriers and work sharing
// inside it: a whole decode step is one parallel region.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace pocketslm {

class ThreadPool {
 public:
  // The calling thread is member 0. With `pin`, members are bound to the fastest CPUs. Throws
  // std::system_error where a thread cannot be started; those that were have then ended.
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

  // The contiguous part of [0, total) that is a member's to begin with.
  std::pair<size_t, size_t> share_of(unsigned member, size_t total) const {
    return {total * bounds_[member] / kWhole, total * bounds_[member + 1] / kWhole};
  }

  // Outside run(): moves the shares towards the part of the work that each member did since the
  // last call, told by work[member]: cores differ in speed, and so do neighbours of virtual ones.
  // True where the shares changed.
  bool balance(const std::vector<uint64_t>& work);

  // Inside run(): calls f(begin, end) for chunks of [0, total) until none are left, and ends with a
  // barrier. A member streams through its own share from the front; then it helps those that are
  // behind, from the back of their shares, which they have not begun to read ahead.
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
    own.banks[bank ^ 1].taken.store(0, std::memory_order_relaxed);
    own.banks[bank ^ 1].stolen.store(0, std::memory_order_relaxed);
    for (unsigned i = 0; i < size_; ++i) {
      const unsigned owner = (member + i) % size_;
      const auto [first, last] = share_of(owner, total);
      const size_t chunks = (last - first + chunk - 1) / chunk;
      Bank& from = slots_[owner].banks[bank];
      // A ticket says that a chunk is left; the owner's are the first ones, those of others the last.
      for (size_t next = 0; from.taken.fetch_add(1, std::memory_order_relaxed) < chunks; ++next) {
        const size_t at =
            i == 0 ? next : chunks - 1 - from.stolen.fetch_add(1, std::memory_order_relaxed);
        const size_t begin = first + at * chunk;
        f(begin, begin + chunk < last ? begin + chunk : last);
      }
    }
    barrier(idle);
  }

 private:
  using Erased = void (*)(void*, unsigned);
  struct Bank {
    std::atomic<size_t> taken{0}, stolen{0};  // chunks
  };
  struct alignas(64) Slot {
    Bank banks[2];
    unsigned phase = 0;
  };
  static constexpr size_t kWhole = 1024;

  static void relax(unsigned spins);
  void run_erased(Erased function, void* context);
  void end_workers();
  void work(unsigned member, int cpu);

  const unsigned size_;
  std::vector<Slot> slots_;
  std::vector<double> speeds_;   // each member's part of the work, smoothed
  std::vector<size_t> bounds_;   // [members + 1] where shares begin, of kWhole
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
