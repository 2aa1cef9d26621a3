#include "cpu.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "platform.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pocketslm {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
// Asked of the processor itself: __builtin_cpu_supports answers no to all in zig's static builds.
struct Features {
  uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0, leaf7_1_eax = 0;
  uint32_t saved = 0;  // XCR0: registers that the system keeps when it switches threads
};
const Features& features() {
  static const auto found = [] {
    constexpr uint32_t kOsXsave = 1u << 27;
    Features f;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &f.leaf1_ecx, &d) || !(f.leaf1_ecx & kOsXsave)) return Features{};
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
      f.leaf7_ebx = b, f.leaf7_ecx = c;
      const uint32_t subleaves = a;
      if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.leaf7_1_eax = a;
    }
    __asm__("xgetbv" : "=a"(f.saved), "=d"(d) : "c"(0));
    return f;
  }();
  return found;
}

constexpr bool all(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

bool has_avx2() {
  constexpr uint32_t kFma = 1u << 12, kAvx = 1u << 28, kF16c = 1u << 29, kAvx2 = 1u << 5;
  constexpr uint32_t kYmm = 0x6;
  const Features& f = features();
  return all(f.leaf1_ecx, kFma | kAvx | kF16c) && all(f.leaf7_ebx, kAvx2) && all(f.saved, kYmm);
}
bool has_avx512_vnni() {
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr uint32_t kVnni = 1u << 11, kZmm = 0xe6;
  const Features& f = features();
  return has_avx2() && all(f.leaf7_ebx, kF | kDq | kBw | kVl) && all(f.leaf7_ecx, kVnni) &&
         all(f.saved, kZmm);
}
bool has_avx_vnni() {
  constexpr uint32_t kAvxVnni = 1u << 4;
  return kAvxVnniIsEvex ? has_avx512_vnni() : has_avx2() && all(features().leaf7_1_eax, kAvxVnni);
}
#elif defined(__aarch64__)
bool has_dotprod() { return platform::arm_features().dotprod; }
bool has_i8mm() { return platform::arm_features().i8mm; }
#endif

struct Path {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first; the scalar path ends the table and always runs.
constexpr Path kPaths[] = {
#if defined(__x86_64__)
    {&kAvx512VnniKernels, has_avx512_vnni},
    {&kAvxVnniKernels, has_avx_vnni},
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
