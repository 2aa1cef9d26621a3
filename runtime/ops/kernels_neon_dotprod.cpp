// NEON with the dot-product extension (Armv8.2 and later): sdot by lane.
#include <arm_neon.h>

#include "kernels.h"

namespace pocketslm {
namespace {

#include "kernels_neon.inl"

template <WeightKind K, int M>
inline void group_dots(const GroupCodes& group, const int8_t* x, int32x4_t (&dot)[M][2]) {
  dot_by_lanes<K, M>(group, x, dot);
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

const Kernels kNeonDotprodKernels = {
    "neon_dotprod",
    {matmul_float<float>, matmul_float<uint16_t>, matmul<WeightKind::q4_sym>,
     matmul<WeightKind::q4_min>, matmul<WeightKind::q4_zp>, matmul<WeightKind::q8_sym>,
     matmul<WeightKind::q8_min>, matmul<WeightKind::q8_zp>, matmul<WeightKind::q8_split>},
    rms_norm,
    quantize,
    silu_mul,
    attend_f16,
    attend_i8,
    to_f16,
    to_i8,
    weigh_scales,
    sum_exp,
    int8_probe,
};

}  // namespace pocketslm
