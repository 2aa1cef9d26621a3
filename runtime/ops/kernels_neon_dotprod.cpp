// NEON with the dot-product extension (Armv8.2 and later): sdot by lane.
#include <arm_neon.h>

#include "kernels.h"

namespace pocketslm {
namespace {

#include "kernels_neon.inl"

template <WeightKind K, int M, int begin, int end>
inline void group_dots(const GroupCodes& group, const int8_t* x, int32x4_t (&dot)[M][2]) {
  dot_by_lanes<K, M, begin, end>(group, x, dot);
}

uint64_t int8_probe(size_t iterations) {
  int32x4_t acc[12];
  int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
  for (auto& x : acc) x = vdupq_n_s32(0);
  for (size_t i = 0; i < iterations; ++i) {
    for (auto& x : acc) x = vdotq_s32(x, a, b);
    __asm__ volatile("" : "+w"(a), "+w"(b));
  }
  for (auto& x : acc) __asm__ volatile("" : "+w"(x));
  return iterations * 12 * 16;
}

}  // namespace

const Kernels kNeonDotprodKernels = POCKETSLM_KERNELS("neon_dotprod");

}  // namespace pocketslm
