// What the NEON paths share: sixteen floats in four registers, and the quantized matrix product of
// any kind around group_dots, which each path defines. Include inside an anonymous namespace.

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
inline V16 round_down(V16 x) {
  return map([&](int i) { return vrndmq_f32(x.v[i]); });
}
// p * 2^n for whole n, where both p and that are normal numbers: n is added to the exponent.
inline V16 times_power_of_two(V16 p, V16 n) {
  return map([&](int i) {
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n.v[i]), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p.v[i]), exponent));
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
inline V16 load_half16(const void* p) {
  const float16x8_t low = vld1q_f16(static_cast<const __fp16*>(p));
  const float16x8_t high = vld1q_f16(static_cast<const __fp16*>(p) + 8);
  return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low),
           vcvt_f32_f16(vget_low_f16(high)), vcvt_high_f32_f16(high)}};
}
inline V16 load_kv(const uint16_t* p) { return load_half16(p); }
inline V16 load_kv(const float* p) { return load(p); }
inline V16 load_factor(const uint16_t* p) { return load_half16(p); }
inline V16 load_factor(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
inline void store_f16(uint16_t* p, V16 x) {
  for (int i = 0; i < 4; ++i) vst1_f16(reinterpret_cast<__fp16*>(p + 4 * i), vcvt_f16_f32(x.v[i]));
}
// Rounds to int8, and adds the codes to four sums.
inline int8x16_t round_i8(V16 x, int32x4_t& sums) {
  int32x4_t q[4];
  for (int i = 0; i < 4; ++i) q[i] = vcvtnq_s32_f32(x.v[i]);
  const int16x8_t low = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
  sums = vaddq_s32(sums, vaddq_s32(vaddq_s32(q[0], q[1]), vaddq_s32(q[2], q[3])));
  return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}
inline int32_t store_i8(int8_t* p, V16 x) {
  int32x4_t sums = vdupq_n_s32(0);
  vst1q_s8(p, round_i8(x, sums));
  return vaddvq_s32(sums);
}
#ifdef POCKETSLM_PAIRED_CODES
// Codes of two tokens together, eight columns of one beside the same of the other, in the order of
// unpack_pairs.
inline int32_t store_group(const QuantizedRow& row, int8_t* codes, V16 lo, V16 hi,
                           int32_t& upper) {
  int32x4_t lower_sums = vdupq_n_s32(0), upper_sums = vdupq_n_s32(0);
  const int8x16_t a = round_i8(lo, lower_sums), b = round_i8(hi, upper_sums);
  upper = vaddvq_s32(upper_sums);
  const int32_t sum = vaddvq_s32(vaddq_s32(lower_sums, upper_sums));
  if (row.tokens == 1) {
    vst1q_s8(codes, a), vst1q_s8(codes + 16, b);
    return sum;
  }
  const int32x4_t x = vreinterpretq_s32_s8(a), y = vreinterpretq_s32_s8(b);
  const int8x16_t even = vreinterpretq_s8_s32(vuzp1q_s32(x, y));
  const int8x16_t odd = vreinterpretq_s8_s32(vuzp2q_s32(x, y));
  const size_t second = row.token % 2;
  int8_t* p = codes - second * kGroup + second * 8;
  vst1_s8(p, vget_low_s8(even)), vst1_s8(p + 16, vget_low_s8(odd));
  vst1_s8(p + 32, vget_high_s8(even)), vst1_s8(p + 48, vget_high_s8(odd));
  return sum;
}
#endif
// Whole numbers up to 127 * 128, rounded to these, in two digits.
inline void store_digits(int8_t* high, int8_t* low, V16 x) {
  uint16x8_t words[2];
  for (int i = 0; i < 2; ++i)
    words[i] = vmovn_high_u32(vmovn_u32(vcvtnq_u32_f32(x.v[2 * i])), vcvtnq_u32_f32(x.v[2 * i + 1]));
  const uint8x16_t upper = vshrn_high_n_u16(vshrn_n_u16(words[0], 7), words[1], 7);
  const uint8x16_t lower = vmovn_high_u16(vmovn_u16(words[0]), words[1]);
  vst1q_s8(high, vreinterpretq_s8_u8(upper));
  vst1q_s8(low, vreinterpretq_s8_u8(vandq_u8(lower, vdupq_n_u8(127))));
}
constexpr size_t kMaxRegisterRows = 6, kAccumulators = 6;

// Clang loads as early and computes as late as it can, and runs out of registers by it: no load moves
// across this, and what gives these values is done. GCC keeps the order by -fno-schedule-insns.
template <typename T>
inline void finish([[maybe_unused]] T& x) {
#if defined(__clang__)
  __asm__ volatile("" : "+w"(x) : : "memory");
#endif
}
template <typename T>
inline void finish_all(T& x) {
  for (auto& one : x) finish(one);
}

// Four factors that follow each other.
#define POCKETSLM_FACTORS_BY_LANE
constexpr size_t kMaxLaneRows = 3;  // more of them run out of registers
struct Lanes {
  float32x4_t v;
  Lanes() = default;
  explicit Lanes(const float* p) : v(vld1q_f32(p)) {}
  // acc += this lane * x
  template <size_t lane>
  void add(V16 x, V16& acc) const {
    for (int i = 0; i < 4; ++i) acc.v[i] = vfmaq_laneq_f32(acc.v[i], x.v[i], v, lane);
    finish_all(acc.v);
  }
};

// Dot products of int8.
struct I16 {
  int32x4_t v[4];
};
struct Quad {
  int8x16_t v;
};
inline I16 set1_i32(int32_t x) {
  const int32x4_t v = vdupq_n_s32(x);
  return {{v, v, v, v}};
}
inline Quad load_quad(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return {vreinterpretq_s8_s32(vdupq_n_s32(quad))};
}
struct SignedLine {
  static constexpr int32_t kBias = 0;
  int8x16_t v[4];
  SignedLine() = default;
  explicit SignedLine(const int8_t* p)
      : v{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)} {}
  void dot(I16& acc, Quad quad) const {
    for (int i = 0; i < 4; ++i) acc.v[i] = vdotq_s32(acc.v[i], v[i], quad.v);
  }
};
using UnsignedLine = SignedLine;  // factors of up to 127 are either
inline I16 join_digits(I16 high, I16 low) {
  for (int i = 0; i < 4; ++i) high.v[i] = vaddq_s32(vshlq_n_s32(high.v[i], 7), low.v[i]);
  return high;
}
inline V16 to_float(I16 x) {
  return map([&](int i) { return vcvtq_f32_s32(x.v[i]); });
}
constexpr size_t kDotRows = 3, kDotAccumulators = 6, kMaxDotPanels = 1;

#include "kernels_vector.inl"

// Bits to the left, or to the right where By is negative; what crosses into the next byte is lost.
template <int By>
inline uint8x16_t moved(uint8x16_t v) {
  if constexpr (By > 0) return vshlq_n_u8(v, By);
  if constexpr (By < 0) return vshrq_n_u8(v, -By);
  return v;
}

// Quad `j` of four rows in codes of up to 6 bits.
template <WeightKind K, int j>
inline uint8x16_t load_quad(const uint8_t* p) {
  constexpr Form form = form_of(K);
  constexpr int first = static_cast<int>(low_bits(form)), rest = static_cast<int>(form.bits) - first;
  constexpr int per_line = 8 / first, i = j % per_line;
  uint8x16_t code = moved<-first * i>(vld1q_u8(p + 64 * (j / per_line)));
  if constexpr (i + 1 < per_line) code = vandq_u8(code, vdupq_n_u8((1 << first) - 1));
  if constexpr (rest > 0) {
    constexpr int rest_per_line = 8 / rest, at = j % rest_per_line;
    const uint8x16_t line = vld1q_u8(p + 64 * first + 64 * (j / rest_per_line));
    const uint8x16_t mask = vdupq_n_u8(((1 << rest) - 1) << first);
    code = vorrq_u8(code, vandq_u8(moved<first - rest * at>(line), mask));
  }
  return code;
}

// The values of four rows and two quads of columns of a group, as signed bytes.
template <WeightKind K, int pair>
inline void load_quads(const uint8_t* group, int rows, int8x16_t& even, int8x16_t& odd) {
  constexpr Form form = form_of(K);
  const uint8_t* p = group + rows * 16;
  const uint8x16_t first = load_quad<K, 2 * pair>(p), second = load_quad<K, 2 * pair + 1>(p);
  if constexpr (form.table == Table::none) {
    even = vreinterpretq_s8_u8(first), odd = vreinterpretq_s8_u8(second);
  } else {
    const int8x16_t table = vld1q_s8(form.table == Table::iq4 ? kIq4Values : kFp4Values);
    even = vqtbl1q_s8(table, first), odd = vqtbl1q_s8(table, second);
  }
}

// What a dot product starts from, so that it ends as the sum of (code - zero) * x for kinds without
// offsets and of code * x for others.
template <WeightKind K>
inline int32_t start_dot(const ActivationTile& tile, size_t at, int part) {
  constexpr Form form = form_of(K);
  if constexpr (form.offset != Offset::none || form.table != Table::none) return 0;
  return zero_correction<K>(tile, at, part);
}

// The scales and minimums of group g for four rows: one of each, or two where they are of 16 columns.
template <WeightKind K>
inline void load_scales(const uint8_t* scales, const uint8_t* offsets, size_t g, size_t row,
                        float32x4_t (&scale)[kScales<K>], float32x4_t (&minimum)[kScales<K>]) {
  constexpr Form form = form_of(K);
  const auto four_bytes = [](const uint8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return vreinterpret_u8_u32(vdup_n_u32(word));
  };
  const auto widened = [](uint8x8_t bytes) {
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
  };
  if constexpr (form.scaling == Scaling::half) {
    scale[0] = load_half4(scales + g * 32 + row * 2);
    if constexpr (form.offset == Offset::minimum)
      minimum[0] = load_half4(offsets + g * 32 + row * 2);
  } else {
    constexpr Factored parts = factored(form);
    constexpr size_t groups = form.factor_columns / kGroup;
    const uint8_t* super = scales + g / groups * parts.bytes;
    const float32x4_t factor = load_half4(super + row * 2);
    for (int i = 0; i < kScales<K>; ++i) {
      const size_t entry = g % groups * kScales<K> + static_cast<size_t>(i);
      const uint8_t* p = super + parts.first + entry * parts.step + row;
      const uint8x8_t bytes = four_bytes(p);
      if constexpr (form.offset == Offset::none) {
        const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(bytes));
        scale[i] = vmulq_f32(factor, vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))));
      } else {
        constexpr bool nibbles = form.scaling == Scaling::nibble;
        const uint8x8_t low = nibbles ? vand_u8(bytes, vdup_n_u8(15)) : bytes;
        const uint8x8_t lowest = nibbles ? vshr_n_u8(bytes, 4) : four_bytes(p + kBlockRows);
        scale[i] = vmulq_f32(factor, widened(low));
        minimum[i] = vmulq_f32(vnegq_f32(load_half4(super + 32 + row * 2)), widened(lowest));
      }
    }
  }
}

// dot[t][i] += rows 4i..4i+3 of the group's quads [begin, end) times token t, for eight rows.
template <WeightKind K, int M, int begin, int end>
inline void group_dots(const uint8_t* group, const int8_t* x, int32x4_t (&dot)[M][2]);

// Tokens [first, first + M) of the tile for one block, eight rows at a time.
template <WeightKind K, int M>
void matmul_part(const Blocks& block, size_t cols, const ActivationTile& tile, size_t first,
                 float* out, size_t out_stride) {
  constexpr Form form = form_of(K);
  constexpr int S = kScales<K>;
  const BlockLayout layout = block_layout(K, cols);
  for (size_t half = 0; half < 2; ++half) {
    float32x4_t acc[M][2];
    for (auto& pair : acc) pair[0] = pair[1] = vdupq_n_f32(0.0f);
    for (size_t g = 0; g < cols / kGroup; ++g) {
      const size_t at = g * tile.tokens + first;
      const uint8_t* group = block.data + half * 32 + g * group_bytes(form);
      int32x4_t dot[S][M][2];
      unrolled<S>([&](auto index) {
        constexpr int part = index;
        for (int t = 0; t < M; ++t)
          dot[part][t][0] = dot[part][t][1] =
              vdupq_n_s32(start_dot<K>(tile, at + static_cast<size_t>(t), part));
        group_dots<K, M, 8 / S * part, 8 / S * (part + 1)>(group, tile.codes + at * kGroup,
                                                           dot[part]);
      });
      for (int i = 0; i < 2; ++i) {
        float32x4_t scale[S], minimum[S];
        load_scales<K>(block.data + layout.scales, block.data + layout.offsets, g,
                       half * 8 + static_cast<size_t>(i) * 4, scale, minimum);
        for (int t = 0; t < M; ++t)
          for (int part = 0; part < S; ++part) {
            const size_t token = at + static_cast<size_t>(t);
            const float32x4_t factor = vmulq_n_f32(scale[part], tile.scales[token]);
            acc[t][i] = vfmaq_f32(acc[t][i], vcvtq_f32_s32(dot[part][t][i]), factor);
            if constexpr (form.offset != Offset::none)
              acc[t][i] = vfmaq_n_f32(acc[t][i], minimum[part], part_sum<K>(tile, token, part));
          }
      }
    }
    for (size_t t = 0; t < M; ++t)
      for (size_t i = 0; i < 2; ++i)
        vst1q_f32(out + (first + t) * out_stride + half * 8 + i * 4, acc[t][i]);
  }
}

// The kinds that kernels_neon_half.inl leaves: codes below 8 bits without zero points.
template <WeightKind K>
void matmul_any(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
                float* out, size_t out_stride) {
  const size_t lines = lines_read<K>(blocks, block_layout(K, cols));
  for (size_t b = 0; b < count; ++b, out += kBlockRows) {
    const Blocks block = blocks.from(b);
    if (tile.ahead) use_lines(*tile.ahead, lines);
    if (tile.tokens == 1) matmul_part<K, 1>(block, cols, tile, 0, out, out_stride);
    if (tile.tokens == 2) matmul_part<K, 2>(block, cols, tile, 0, out, out_stride);
    for (size_t t = 0; t + 4 <= tile.tokens; t += 4)
      matmul_part<K, 4>(block, cols, tile, t, out, out_stride);
  }
}

// Four rows times sixteen columns of one token: the lanes of x are its four quads.
template <WeightKind K, int M, int begin, int end>
inline void dot_by_lanes(const uint8_t* group, const int8_t* x, int32x4_t (&dot)[M][2]) {
  unrolled<(end - begin) / 4>([&](auto index) {
    constexpr int half = begin / 4 + index;
    int8x16_t columns[M];
    for (int t = 0; t < M; ++t) columns[t] = vld1q_s8(x + t * 32 + half * 16);
    for (int i = 0; i < 2; ++i) {
      int8x16_t even, odd;
      load_quads<K, half * 2>(group, i, even, odd);
      for (int t = 0; t < M; ++t) {
        dot[t][i] = vdotq_laneq_s32(dot[t][i], even, columns[t], 0);
        dot[t][i] = vdotq_laneq_s32(dot[t][i], odd, columns[t], 1);
      }
      load_quads<K, half * 2 + 1>(group, i, even, odd);
      for (int t = 0; t < M; ++t) {
        dot[t][i] = vdotq_laneq_s32(dot[t][i], even, columns[t], 2);
        dot[t][i] = vdotq_laneq_s32(dot[t][i], odd, columns[t], 3);
      }
    }
  });
}

#include "kernels_neon_half.inl"

template <WeightKind K>
void matmul(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
            float* out, size_t out_stride) {
  if constexpr (is_half_scaled(form_of(K)))
    matmul_half<K>(blocks, count, cols, tile, out, out_stride);
  else
    matmul_any<K>(blocks, count, cols, tile, out, out_stride);
}
