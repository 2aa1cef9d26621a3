// NEON with int8 matrix multiplication (Armv8.6 and later): smmla for two or more tokens.
#include <arm_neon.h>

#include "kernels.h"

namespace pocketslm {
namespace {

constexpr size_t kMostTokens = 16;
#define POCKETSLM_PAIRED_CODES

#include "kernels_neon.inl"

// smmla multiplies two rows of eight columns by two tokens: {r0t0, r0t1, r1t0, r1t1}.
template <WeightKind K, int M, int begin, int end>
inline void group_dots(const uint8_t* group, const int8_t* x, int32x4_t (&dot)[M][2]) {
  if constexpr (M == 1) {
    dot_by_lanes<K, M, begin, end>(group, x, dot);
  } else {
    int32x4_t tiles[M / 2][4];
    for (auto& line : tiles)
      for (auto& tile : line) tile = vdupq_n_s32(0);
    unrolled<(end - begin) / 4>([&](auto index) {
      constexpr int half = begin / 4 + index;
      int8x16_t tokens[M / 2][2];  // as store_group has them
      for (int t = 0; t < M / 2; ++t) {
        const int8_t* p = x + 2 * t * 32 + half * 32;
        tokens[t][0] = vld1q_s8(p), tokens[t][1] = vld1q_s8(p + 16);
      }
      for (int i = 0; i < 2; ++i) {
        int8x16_t quads[2][2];  // [those of a line][line]
        load_quads<K, 2 * half>(group, i, quads[0][0], quads[1][0]);
        load_quads<K, 2 * half + 1>(group, i, quads[0][1], quads[1][1]);
        for (int k = 0; k < 2; ++k) {
          const int32x4_t first = vreinterpretq_s32_s8(quads[k][0]);
          const int32x4_t second = vreinterpretq_s32_s8(quads[k][1]);
          const int8x16_t upper = vreinterpretq_s8_s32(vzip1q_s32(first, second));  // rows 0, 1
          const int8x16_t lower = vreinterpretq_s8_s32(vzip2q_s32(first, second));  // rows 2, 3
          for (int t = 0; t < M / 2; ++t) {
            tiles[t][2 * i] = vmmlaq_s32(tiles[t][2 * i], upper, tokens[t][k]);
            tiles[t][2 * i + 1] = vmmlaq_s32(tiles[t][2 * i + 1], lower, tokens[t][k]);
          }
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

// Two numbers of a pair of tokens, for two rows.
inline float32x4_t both(const float* p) {
  return vreinterpretq_f32_f64(vld1q_dup_f64(reinterpret_cast<const double*>(p)));
}
inline int32x4_t both(const int32_t* p) {
  return vreinterpretq_s32_s64(vld1q_dup_s64(reinterpret_cast<const int64_t*>(p)));
}

// All stays as smmla has it, the scales too, until the end.
template <WeightKind K, int T>
void matmul_rows(const Blocks& block, size_t cols, size_t row, const ActivationTile& shared,
                 size_t first, float* out, size_t out_stride) {
  const ActivationTile tile = shared;  // in registers, whatever finish() makes of memory
  const BlockLayout layout = block_layout(K, cols);
  const RowScales<K> scaling(block.data, layout, row);
  const uint8_t* codes = block.data + row * 4;
  float32x4_t acc[T / 2][2];
  unrolled<T / 2>([&](int pair) { acc[pair][0] = acc[pair][1] = vdupq_n_f32(0.0f); });
  for (size_t g = 0; g < cols / kGroup; ++g) {
    const size_t at = g * tile.tokens + first;
    const GroupCodes group{codes + g * group_bytes(form_of(K)), low_of<K>(block, g, row * 4)};
    int8x16_t w[2][4];
    for (int half = 0; half < 2; ++half) unpack_pairs<K>(group, half, w[half]);
    float32x4_t scale, minimum{};
    scaling.load4(g, scale, minimum);
    const float32x4_t scales[2] = {vzip1q_f32(scale, scale), vzip2q_f32(scale, scale)};
    const float32x4_t minima[2] = {vzip1q_f32(minimum, minimum), vzip2q_f32(minimum, minimum)};
    unrolled<T / 2>([&](int pair) __attribute__((always_inline)) {
      const size_t from = at + 2 * pair;
      const int8_t* p = tile.codes + from * kGroup;
      const int8x16_t x[4] = {vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)};
      int32x4_t dot[2];
      dot[0] = dot[1] = start_dots<K>(both(tile.corrections + from));
      for (int k = 0; k < 4; ++k)
        for (int i = 0; i < 2; ++i) dot[i] = vmmlaq_s32(dot[i], w[k / 2][2 * i + k % 2], x[k]);
      const float32x4_t factors = both(tile.scales + from);
      for (int i = 0; i < 2; ++i) {
        float32x4_t& sum = acc[pair][i];
        sum = vfmaq_f32(sum, vcvtq_f32_s32(dot[i]), vmulq_f32(scales[i], factors));
        if constexpr (form_of(K).offset != Offset::none)
          sum = vfmaq_f32(sum, minima[i], both(tile.sums + from));
      }
      finish_all(acc[pair]);
    });
  }
  unrolled<T / 2>([&](int pair) {
    float* to = out + 2 * pair * out_stride;
    vst1q_f32(to, vuzp1q_f32(acc[pair][0], acc[pair][1]));
    vst1q_f32(to + out_stride, vuzp2q_f32(acc[pair][0], acc[pair][1]));
  });
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
