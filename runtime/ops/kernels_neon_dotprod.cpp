// NEON with the dot-product extension (Armv8.2 and later): sdot by lane.
#include <arm_neon.h>

#include "kernels.h"

namespace pocketslm {
namespace {

constexpr size_t kMostTokens = 16;

#include "kernels_neon.inl"

template <WeightKind K, int M, int begin, int end>
inline void group_dots(const uint8_t* group, const int8_t* x, int32x4_t (&dot)[M][2]) {
  dot_by_lanes<K, M, begin, end>(group, x, dot);
}

// Numbers of N tokens.
template <int N>
inline auto load_few(const float* p) {
  if constexpr (N == 4) return vld1q_f32(p);
  else return vld1_f32(p);
}
template <int N>
inline auto load_few(const int32_t* p) {
  if constexpr (N == 4) return vld1q_s32(p);
  else return vld1_s32(p);
}

template <WeightKind K, int T>
void matmul_rows(const Blocks& block, size_t cols, size_t row, const ActivationTile& shared,
                 size_t first, float* out, size_t out_stride) {
  const ActivationTile tile = shared;  // in registers, whatever finish() makes of memory
  const BlockLayout layout = block_layout(K, cols);
  const RowScales<K> scaling(block.data, layout, row);
  const uint8_t* codes = block.data + row * 4;
  constexpr int kTogether = T < 4 ? T : 4;
  float32x4_t acc[T];
  unrolled<T>([&](int t) { acc[t] = vdupq_n_f32(0.0f); });
  for (size_t g = 0; g < cols / kGroup; ++g) {
    const size_t at = g * tile.tokens + first;
    const GroupCodes group{codes + g * group_bytes(form_of(K)), low_of<K>(block, g, row * 4)};
    int8x16_t w[2][4];
    for (int half = 0; half < 2; ++half) unpack<K>(group, half, w[half]);
    float32x4_t scale, minimum{};
    scaling.load4(g, scale, minimum);
    unrolled<T / kTogether>([&](int few) __attribute__((always_inline)) {
      // Numbers of several tokens come in one load each.
      const size_t from = at + few * kTogether;
      const auto corrections = load_few<kTogether>(tile.corrections + from);
      const auto factors = load_few<kTogether>(tile.scales + from);
      const auto sums = load_few<kTogether>(tile.sums + from);
      unrolled<kTogether>([&](int t) __attribute__((always_inline)) {
        const int8_t* p = tile.codes + (from + t) * kGroup;
        const int8x16_t x[2] = {vld1q_s8(p), vld1q_s8(p + 16)};
        int32x4_t dot = start_dots<K>(vdupq_n_s32(corrections[t]));
        for (int half = 0; half < 2; ++half) {
          dot = vdotq_laneq_s32(dot, w[half][0], x[half], 0);
          dot = vdotq_laneq_s32(dot, w[half][1], x[half], 1);
          dot = vdotq_laneq_s32(dot, w[half][2], x[half], 2);
          dot = vdotq_laneq_s32(dot, w[half][3], x[half], 3);
        }
        float32x4_t& sum = acc[few * kTogether + t];
        sum = vfmaq_f32(sum, vcvtq_f32_s32(dot), vmulq_n_f32(scale, factors[t]));
        if constexpr (form_of(K).offset != Offset::none) sum = vfmaq_n_f32(sum, minimum, sums[t]);
        finish(sum);
      });
    });
  }
  unrolled<T>([&](int t) { vst1q_f32(out + t * out_stride, acc[t]); });
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
