#include "thread_pool.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <utility>

#include "platform.h"

namespace pocketslm {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");  // a pause on most cores, where `yield` is a no-op
#endif
}

// A member that waits at a barrier gives its CPU away after this many pauses: with more threads
// than CPUs the one it waits for may need it.
constexpr unsigned kBarrierSpins = 2000;
// Shares follow the work done over about this many calls, in steps of this many parts of kWhole.
constexpr double kSmoothing = 1.0 / 16;
constexpr size_t kStep = 16;
// Between two calls, such as two decode steps, workers stay awake this long.
constexpr auto kIdleSpin = std::chrono::microseconds(300);

void bind_to(int cpu) {
  if (cpu >= 0) platform::bind_thread(cpu);
}

}  // namespace

std::vector<int> cpus_by_speed() {
  std::vector<std::pair<long, int>> found;
  for (int cpu : platform::usable_cpus()) found.emplace_back(-platform::cpu_speed(cpu), cpu);
  std::sort(found.begin(), found.end());
  std::vector<int> cpus;
  for (const auto& entry : found) cpus.push_back(entry.second);
  return cpus;
}

ThreadPool::ThreadPool(unsigned threads, bool pin)
    : size_(threads), slots_(threads), speeds_(threads, 1.0 / threads), bounds_(threads + 1) {
  for (unsigned member = 0; member <= size_; ++member) bounds_[member] = kWhole * member / size_;
  const std::vector<int> cpus = pin ? cpus_by_speed() : std::vector<int>();
  const auto cpu_of = [&](unsigned member) {
    return cpus.empty() ? -1 : cpus[member % cpus.size()];
  };
  workers_.reserve(size_ - 1);
  try {
    for (unsigned member = 1; member < size_; ++member)
      workers_.emplace_back([this, member, cpu = cpu_of(member)] { work(member, cpu); });
  } catch (...) {
    end_workers();
    throw;
  }
  bind_to(cpu_of(0));
}

ThreadPool::~ThreadPool() { end_workers(); }

void ThreadPool::end_workers() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    job_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

bool ThreadPool::balance(const std::vector<uint64_t>& work) {
  const uint64_t total = std::accumulate(work.begin(), work.end(), uint64_t{0});
  if (size_ == 1 || total == 0) return false;
  bool changed = false;
  double before = 0;
  for (unsigned member = 0; member + 1 < size_; ++member) {
    const double part = static_cast<double>(work[member]) / static_cast<double>(total);
    speeds_[member] += kSmoothing * (part - speeds_[member]);
    before += speeds_[member];
    const auto bound = static_cast<size_t>(before * kWhole);
    // Small moves are not worth a new plan.
    if (std::max(bound, bounds_[member + 1]) - std::min(bound, bounds_[member + 1]) > kStep)
      changed = true;
  }
  if (!changed) return false;
  before = 0;
  for (unsigned member = 0; member + 1 < size_; ++member)
    bounds_[member + 1] = static_cast<size_t>((before += speeds_[member]) * kWhole);
  return true;
}

void ThreadPool::relax(unsigned spins) {
  if (spins < kBarrierSpins)
    pause();
  else
    std::this_thread::yield();
}

void ThreadPool::run_erased(Erased function, void* context) {
  function_ = function;
  context_ = context;
  if (size_ > 1) {
    // Workers that are awake see the number change; the lock is for those about to sleep.
    { std::lock_guard<std::mutex> lock(mutex_); job_.fetch_add(1, std::memory_order_release); }
    wake_.notify_all();
  }
  function(context, 0);
  barrier([] {});  // the workers are done, and may be told to start again
}

void ThreadPool::work(unsigned member, int cpu) {
  bind_to(cpu);
  uint64_t seen = 0;
  for (;;) {
    const auto deadline = std::chrono::steady_clock::now() + kIdleSpin;
    while (job_.load(std::memory_order_acquire) == seen) {
      for (int i = 0; i < 32 && job_.load(std::memory_order_acquire) == seen; ++i) pause();
      if (std::chrono::steady_clock::now() < deadline) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return job_.load() != seen; });
    }
    seen = job_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    function_(context_, member);
    barrier([] {});
  }
}

}  // namespace pocketslm
