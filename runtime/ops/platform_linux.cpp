// The part of platform.h that is Linux's own.
#include <fcntl.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <initializer_list>
#include <utility>

#include "platform.h"

namespace pocketslm::platform {
namespace {

static_assert(kMaxCpus == CPU_SETSIZE);

long read_number(const char* format, int cpu) {
  char path[96];
  std::snprintf(path, sizeof path, format, cpu);
  long value = 0;
  if (FILE* file = std::fopen(path, "r")) {
    if (std::fscanf(file, "%ld", &value) != 1) value = 0;
    std::fclose(file);
  }
  return value;
}

// Adds up the lines "NAME: COUNT kB" of a file of /proc into the target of each name.
void read_kilobytes(const char* path,
                    std::initializer_list<std::pair<const char*, uint64_t*>> targets) {
  FILE* file = std::fopen(path, "r");
  if (!file) return;
  char line[256], name[64];
  unsigned long long kilobytes = 0;
  while (std::fgets(line, sizeof line, file))
    if (std::sscanf(line, "%63[^:]: %llu kB", name, &kilobytes) == 2)
      for (const auto& [wanted, target] : targets)
        if (!std::strcmp(name, wanted)) *target += kilobytes * 1024;
  std::fclose(file);
}

// From the kernel's hwcap.h, which old toolchains lack.
constexpr unsigned long kHwcapDotprod = 1ul << 20;
constexpr unsigned long kHwcap2I8mm = 1ul << 13;

}  // namespace

std::vector<int> usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < kMaxCpus; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

long cpu_speed(int cpu) {
  const long capacity = read_number("/sys/devices/system/cpu/cpu%d/cpu_capacity", cpu);
  return capacity ? capacity
                  : read_number("/sys/devices/system/cpu/cpu%d/cpufreq/cpuinfo_max_freq", cpu);
}

void use_large_pages(void* pages, size_t bytes) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1
  // Where it fails, small pages stay.
  if (madvise(pages, bytes, MADV_HUGEPAGE) == 0) madvise(pages, bytes, kCollapse);
}

bool binds_threads() { return true; }

void bind_thread(int cpu) { run_on({cpu}); }  // an Android cpuset may forbid it

bool run_on(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  return sched_setaffinity(0, sizeof set, &set) == 0;
}

ArmFeatures arm_features() {
  const bool dotprod = getauxval(AT_HWCAP) & kHwcapDotprod;
  return {dotprod, dotprod && getauxval(AT_HWCAP2) & kHwcap2I8mm};
}

Memory memory() {
  Memory found;
  read_kilobytes("/proc/self/status", {{"VmRSS", &found.resident},
                                       {"VmHWM", &found.peak},
                                       {"RssAnon", &found.anonymous},
                                       {"RssFile", &found.file_backed}});
  read_kilobytes("/proc/self/smaps_rollup",
                 {{"Pss", &found.proportional}, {"Pss_File", &found.proportional_file}});
  return found;
}

bool drop_from_page_cache(const char* path) {
  const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return true;  // opening the model says why
  fsync(file);  // pages that were not written yet would stay
  posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
  close(file);
  return true;
}

}  // namespace pocketslm::platform
