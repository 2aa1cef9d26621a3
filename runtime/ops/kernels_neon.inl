// What the NEON paths share: sixteen floats in four registers, and the quantized matrix product
// around group_dots, which each path defines. Include inside an anonymous namespace.

struct V16 {
  float32x4_t v[4];
};
template <typename F>
inline V16 map(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline V16 load(const float* p) {
  return map([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, V16 x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline V16 set1(float x) {
  return map([&](int) { return vdupq_n_f32(x); });
}
inline V16 zero() { return set1(0.0f); }
inline V16 add(V16 x, V16 y) {
  return map([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
}
inline V16 sub(V16 x, V16 y) {
  return map([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
}
inline V16 mul(V16 x, V16 y) {
  return map([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
}
inline V16 div(V16 x, V16 y) {
  return map([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
}
inline V16 max(V16 x, V16 y) {
  return map([&](int i) { return vmaxq_f32(x.v[i], y.v[i]); });
}
inline V16 min(V16 x, V16 y) {
  return map([&](int i) { return vminq_f32(x.v[i], y.v[i]); });
}
inline V16 abs(V16 x) {
  return map([&](int i) { return vabsq_f32(x.v[i]); });
}
inline V16 fma(V16 x, V16 y, V16 z) {
  return map([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
inline V16 round_even(V16 x) {
  return map([&](int i) { return vrndnq_f32(x.v[i]); });
}
inline V16 power_of_two(V16 n) {
  return map([&](int i) {
    const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
  });
}
// The same tree as on x86: halves, quarters, pairs.
inline float reduce_add(V16 x) {
  const float32x4_t q = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t pair = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
}
inline float reduce_max(V16 x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[2]), vmaxq_f32(x.v[1], x.v[3])));
}
// Of NaN and a number, NEON's maximum is NaN.
inline V16 larger_magnitude(V16 peaks, V16 x) { return max(peaks, abs(x)); }
inline float reduce_magnitude(V16 peaks) { return reduce_max(peaks); }
inline float32x4_t load_half4(const void* p) {
  return vcvt_f32_f16(vld1_f16(static_cast<const __fp16*>(p)));
}
inline V16 load_kv(const uint16_t* p) {
  return map([&](int i) { return load_half4(p + 4 * i); });
}
inline V16 load_kv(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
           vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline V16 load_kv(const float* p) { return load(p); }
inline void store_f16(uint16_t* p, V16 x) {
  for (int i = 0; i < 4; ++i) vst1_f16(reinterpret_cast<__fp16*>(p + 4 * i), vcvt_f16_f32(x.v[i]));
}
inline int32_t store_i8(int8_t* p, V16 x) {
  int32x4_t q[4];
  for (int i = 0; i < 4; ++i) q[i] = vcvtnq_s32_f32(x.v[i]);
  const int16x8_t low = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  return vaddvq_s32(vaddq_s32(vaddq_s32(q[0], q[1]), vaddq_s32(q[2], q[3])));
}
constexpr size_t kMaxRegisterRows = 6;

#include "kernels_vector.inl"

// The codes of one group; split ones have their low nibbles elsewhere.
struct GroupCodes {
  const uint8_t *codes, *low;
};

// A line's part for four rows and two quads of columns, as signed bytes. 8-bit codes lose 128 here,
// which start_dot makes up for.
template <WeightKind K>
inline void load_quads(const GroupCodes& at, int pair, int rows, int8x16_t& even, int8x16_t& odd) {
  const uint8_t* group = at.codes;
  if constexpr (K == WeightKind::q8_split) {
    const uint8x16_t flip = vdupq_n_u8(128);
    const uint8x16_t high = vld1q_u8(group + pair * 64 + rows * 16);
    const uint8x16_t low = vld1q_u8(at.low + pair * 64 + rows * 16);
    even = vreinterpretq_s8_u8(veorq_u8(vsliq_n_u8(low, high, 4), flip));
    odd = vreinterpretq_s8_u8(veorq_u8(vsriq_n_u8(high, low, 4), flip));
  } else if constexpr (code_bits(K) == 8) {
    const uint8x16_t flip = vdupq_n_u8(128);
    const uint8_t* p = group + pair * 128 + rows * 16;
    even = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), flip));
    odd = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 64), flip));
  } else {
    const uint8x16_t packed = vld1q_u8(group + pair * 64 + rows * 16);
    even = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15)));
    odd = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
  }
}

// What a group's dot product starts from, so that it ends as the sum of (code - zero) * x for
// symmetric kinds and of code * x for others; the correction is -8 * sum(x).
template <WeightKind K>
inline int32_t start_dot(int32_t correction) {
  constexpr bool symmetric = offset_of(K) == Offset::none;
  if constexpr (code_bits(K) == 8) return symmetric ? 0 : -16 * correction;
  return symmetric ? correction : 0;
}

// dot[t][i] += rows 4i..4i+3 of the group's codes times token t, for eight rows.
template <WeightKind K, int M>
inline void group_dots(const GroupCodes& group, const int8_t* x, int32x4_t (&dot)[M][2]);

// Tokens [first, first + M) of the tile for one block, eight rows at a time.
template <WeightKind K, int M>
void matmul_part(const uint8_t* block, size_t cols, const ActivationTile& tile, size_t first,
                 float* out, size_t out_stride) {
  constexpr Offset offset = offset_of(K);
  const BlockLayout layout = block_layout(K, cols);
  for (size_t half = 0; half < 2; ++half) {
    const uint8_t* codes = block + half * 32;
    const uint8_t* scales = block + layout.scales + half * 16;
    const uint8_t* offsets = block + layout.offsets + half * (offset == Offset::minimum ? 16 : 8);
    const uint8_t* low = block + layout.offsets + half * 32;
    float32x4_t acc[M][2];
    for (auto& pair : acc) pair[0] = pair[1] = vdupq_n_f32(0.0f);
    for (size_t g = 0; g < cols / kGroup; ++g) {
      const size_t at = g * tile.tokens + first;
      int32x4_t dot[M][2];
      for (int t = 0; t < M; ++t)
        dot[t][0] = dot[t][1] = vdupq_n_s32(start_dot<K>(tile.corrections[at + t]));
      group_dots<K, M>({codes + g * group_bytes(K), low + g * group_bytes(K)},
                       tile.codes + at * kGroup, dot);
      for (int i = 0; i < 2; ++i) {
        const float32x4_t scale = load_half4(scales + g * 32 + i * 8);
        float32x4_t minimum{};
        if constexpr (offset == Offset::minimum) minimum = load_half4(offsets + g * 32 + i * 8);
        if constexpr (offset == Offset::zero_point) {
          const uint16x8_t zeros = vmovl_u8(vld1_u8(offsets + g * 16));
          const uint16x4_t four = i ? vget_high_u16(zeros) : vget_low_u16(zeros);
          minimum = vmulq_f32(vnegq_f32(scale), vcvtq_f32_u32(vmovl_u16(four)));
        }
        for (int t = 0; t < M; ++t) {
          const float32x4_t factor = vmulq_n_f32(scale, tile.scales[at + t]);
          acc[t][i] = vfmaq_f32(acc[t][i], vcvtq_f32_s32(dot[t][i]), factor);
          if constexpr (offset != Offset::none)
            acc[t][i] = vfmaq_n_f32(acc[t][i], minimum, tile.sums[at + t]);
        }
      }
    }
    for (size_t t = 0; t < M; ++t)
      for (size_t i = 0; i < 2; ++i)
        vst1q_f32(out + (first + t) * out_stride + half * 8 + i * 4, acc[t][i]);
  }
}

template <WeightKind K>
void matmul(const uint8_t* blocks, size_t count, size_t cols, const ActivationTile& tile,
            float* out, size_t out_stride) {
  const size_t block_bytes = block_layout(K, cols).bytes;
  for (size_t b = 0; b < count; ++b, blocks += block_bytes, out += kBlockRows) {
    if (tile.ahead) use_lines(*tile.ahead, block_bytes / 64);
    if (tile.tokens == 1) matmul_part<K, 1>(blocks, cols, tile, 0, out, out_stride);
    if (tile.tokens == 2) matmul_part<K, 2>(blocks, cols, tile, 0, out, out_stride);
    for (size_t t = 0; t + 4 <= tile.tokens; t += 4)
      matmul_part<K, 4>(blocks, cols, tile, t, out, out_stride);
  }
}

// Four rows times sixteen columns of one token: the lanes of x are its four quads.
template <WeightKind K, int M>
inline void dot_by_lanes(const GroupCodes& group, const int8_t* x, int32x4_t (&dot)[M][2]) {
  for (int half = 0; half < 2; ++half) {
    int8x16_t columns[M];
    for (int t = 0; t < M; ++t) columns[t] = vld1q_s8(x + t * 32 + half * 16);
    for (int i = 0; i < 2; ++i) {
      int8x16_t even, odd;
      load_quads<K>(group, half * 2, i, even, odd);
      for (int t = 0; t < M; ++t) {
        dot[t][i] = vdotq_laneq_s32(dot[t][i], even, columns[t], 0);
        dot[t][i] = vdotq_laneq_s32(dot[t][i], odd, columns[t], 1);
      }
      load_quads<K>(group, half * 2 + 1, i, even, odd);
      for (int t = 0; t < M; ++t) {
        dot[t][i] = vdotq_laneq_s32(dot[t][i], even, columns[t], 2);
        dot[t][i] = vdotq_laneq_s32(dot[t][i], odd, columns[t], 3);
      }
    }
  }
}
