#include "cpu.h"

#include <array>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pocketslm {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
// From the kernel's hwcap.h, which old toolchains lack.
constexpr unsigned long kHwcapDotprod = 1ul << 20;
constexpr unsigned long kHwcap2I8mm = 1ul << 13;
bool has_dotprod() { return getauxval(AT_HWCAP) & kHwcapDotprod; }
bool has_i8mm() { return has_dotprod() && getauxval(AT_HWCAP2) & kHwcap2I8mm; }
#endif

struct Path {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first; the scalar path ends the table and always runs.
constexpr Path kPaths[] = {
#if defined(__x86_64__)
    {&kAvx512VnniKernels, has_avx512_vnni},
    {&kAvx2Kernels, has_avx2},
#elif defined(__aarch64__)
    {&kNeonI8mmKernels, has_i8mm},
    {&kNeonDotprodKernels, has_dotprod},
#endif
    {&kScalarKernels, always},
};
constexpr size_t kPathCount = sizeof(kPaths) / sizeof(kPaths[0]);

// Detected once; the tail of the array stays null.
const std::array<const Kernels*, kPathCount + 1>& available() {
  static const auto found = [] {
    std::array<const Kernels*, kPathCount + 1> list{};
    size_t n = 0;
    for (const Path& path : kPaths)
      if (path.supported()) list[n++] = path.kernels;
    return list;
  }();
  return found;
}

}  // namespace

const Kernels* select_kernels(const char* isa) {
  if (!isa || std::strcmp(isa, "auto") == 0) {
    isa = std::getenv("POCKETSLM_ISA");
    if (!isa || !*isa || std::strcmp(isa, "auto") == 0) return available()[0];
  }
  for (const Kernels* kernels : available())
    if (kernels && std::strcmp(kernels->name, isa) == 0) return kernels;
  return nullptr;
}

const char* const* available_isa_names() {
  static const auto names = [] {
    std::array<const char*, kPathCount + 1> list{};
    for (size_t i = 0; i < kPathCount && available()[i]; ++i) list[i] = available()[i]->name;
    return list;
  }();
  return names.data();
}

}  // namespace pocketslm
