// NEON with int8 matrix multiplication (Armv8.6 and later): smmla for two or more tokens.
#include <arm_neon.h>

#include "kernels.h"

namespace pocketslm {
namespace {

#include "kernels_neon.inl"

// smmla multiplies two rows of eight columns by two tokens: {r0t0, r0t1, r1t0, r1t1}.
template <WeightKind K, int M, int begin, int end>
inline void group_dots(const GroupCodes& group, const int8_t* x, int32x4_t (&dot)[M][2]) {
  if constexpr (M == 1) {
    dot_by_lanes<K, M, begin, end>(group, x, dot);
  } else {
    int32x4_t tiles[M / 2][4];
    for (auto& line : tiles)
      for (auto& tile : line) tile = vdupq_n_s32(0);
    unrolled<(end - begin) / 2>([&](auto index) {
      constexpr int pair = begin / 2 + index;
      int8x16_t tokens[M / 2];
      for (int t = 0; t < M / 2; ++t) {
        const int8_t* p = x + 2 * t * 32 + pair * 8;
        tokens[t] = vcombine_s8(vld1_s8(p), vld1_s8(p + 32));
      }
      for (int i = 0; i < 2; ++i) {
        int8x16_t even, odd;
        load_quads<K, pair>(group, i, even, odd);
        const int32x4_t e = vreinterpretq_s32_s8(even), o = vreinterpretq_s32_s8(odd);
        const int8x16_t upper = vreinterpretq_s8_s32(vzip1q_s32(e, o));  // rows 0 and 1
        const int8x16_t lower = vreinterpretq_s8_s32(vzip2q_s32(e, o));  // rows 2 and 3
        for (int t = 0; t < M / 2; ++t) {
          tiles[t][2 * i] = vmmlaq_s32(tiles[t][2 * i], upper, tokens[t]);
          tiles[t][2 * i + 1] = vmmlaq_s32(tiles[t][2 * i + 1], lower, tokens[t]);
        }
      }
    });
    for (int t = 0; t < M / 2; ++t)
      for (int i = 0; i < 2; ++i) {
        const int32x4_t a = tiles[t][2 * i], b = tiles[t][2 * i + 1];
        dot[2 * t][i] = vaddq_s32(dot[2 * t][i], vuzp1q_s32(a, b));
        dot[2 * t + 1][i] = vaddq_s32(dot[2 * t + 1][i], vuzp2q_s32(a, b));
      }
  }
}

uint64_t int8_probe(size_t iterations) {
  int32x4_t acc[12];
  int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
  for (auto& x : acc) x = vdupq_n_s32(0);
  for (size_t i = 0; i < iterations; ++i) {
    for (auto& x : acc) x = vmmlaq_s32(x, a, b);
    __asm__ volatile("" : "+w"(a), "+w"(b));
  }
  for (auto& x : acc) __asm__ volatile("" : "+w"(x));
  return iterations * 12 * 32;
}

}  // namespace

const Kernels kNeonI8mmKernels = POCKETSLM_KERNELS("neon_i8mm");

}  // namespace pocketslm
