// The part of platform.h that is macOS's own.
#include <mach/mach.h>
#include <sys/resource.h>
#include <sys/sysctl.h>

#include <numeric>
#include <thread>

#include "platform.h"

namespace pocketslm::platform {
namespace {

bool has(const char* feature) {
  int value = 0;
  size_t bytes = sizeof value;
  return sysctlbyname(feature, &value, &bytes, nullptr, 0) == 0 && value;
}

}  // namespace

std::vector<int> usable_cpus() {
  std::vector<int> cpus(std::thread::hardware_concurrency());
  std::iota(cpus.begin(), cpus.end(), 0);
  return cpus;
}

long cpu_speed(int) { return 0; }

void use_large_pages(void*, size_t) {}

bool binds_threads() { return false; }

void bind_thread(int) {}

// Only the choice of all of them can be kept.
bool run_on(const std::vector<int>& cpus) { return cpus == usable_cpus(); }

ArmFeatures arm_features() {
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
}

Memory memory() {
  Memory found;
  mach_task_basic_info info{};
  mach_msg_type_number_t count = MACH_TASK_BASIC_INFO_COUNT;
  if (task_info(mach_task_self(), MACH_TASK_BASIC_INFO, reinterpret_cast<task_info_t>(&info),
                &count) == KERN_SUCCESS)
    found.resident = info.resident_size, found.peak = info.resident_size_max;
  return found;
}

bool drop_from_page_cache(const char*) { return false; }

}  // namespace pocketslm::platform
