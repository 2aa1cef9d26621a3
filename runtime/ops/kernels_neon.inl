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
inline V16 load_half16(const void* p) {
  const float16x8_t low = vld1q_f16(static_cast<const __fp16*>(p));
  const float16x8_t high = vld1q_f16(static_cast<const __fp16*>(p) + 8);
  return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low),
           vcvt_f32_f16(vget_low_f16(high)), vcvt_high_f32_f16(high)}};
}
inline V16 load_kv(const uint16_t* p) { return load_half16(p); }
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
inline int32_t store_group(const QuantizedRow& row, int8_t* codes, V16 lo, V16 hi) {
  int32x4_t sums = vdupq_n_s32(0);
  const int8x16_t a = round_i8(lo, sums), b = round_i8(hi, sums);
  if (row.tokens == 1) {
    vst1q_s8(codes, a), vst1q_s8(codes + 16, b);
    return vaddvq_s32(sums);
  }
  const int32x4_t x = vreinterpretq_s32_s8(a), y = vreinterpretq_s32_s8(b);
  const int8x16_t even = vreinterpretq_s8_s32(vuzp1q_s32(x, y));
  const int8x16_t odd = vreinterpretq_s8_s32(vuzp2q_s32(x, y));
  const size_t second = row.token % 2;
  int8_t* p = codes - second * kGroup + second * 8;
  vst1_s8(p, vget_low_s8(even)), vst1_s8(p + 16, vget_low_s8(odd));
  vst1_s8(p + 32, vget_high_s8(even)), vst1_s8(p + 48, vget_high_s8(odd));
  return vaddvq_s32(sums);
}
#endif
constexpr size_t kMaxRegisterRows = 6;

#include "kernels_vector.inl"

// The codes of one group from some row on; split ones have their low nibbles elsewhere.
struct GroupCodes {
  const uint8_t *codes, *low;
};

// Sixteen columns of a group lie in so many 64-byte lines, from column 16 * half on. This, line_of
// and codes_of are what a kind of weights must define for every kernel here.
template <WeightKind K>
constexpr int kHalfLines = code_bits(K) == 8 ? 4 : 2;

// The lines, those that belong together next to each other: of nibbles, columns 0..7 and 8..15; of
// bytes, columns 0..3 and 8..11, then the others.
template <WeightKind K>
inline const uint8_t* line_of(const GroupCodes& at, int half, int line) {
  if constexpr (K == WeightKind::q8_split)
    return (line < 2 ? at.codes : at.low) + half * 128 + line % 2 * 64;
  else if constexpr (code_bits(K) == 8)
    return at.codes + half * 256 + line % 2 * 128 + line / 2 * 64;
  else
    return at.codes + half * 128 + line * 64;
}

// What is in a quarter of these lines as signed bytes, four rows with four columns each: w[k] has
// columns 4k..4k+3. 8-bit codes lose 128 here, which start_dot makes up for.
template <WeightKind K>
inline void codes_of(const uint8x16_t (&u)[kHalfLines<K>], int8x16_t (&w)[4]) {
  const uint8x16_t flip = vdupq_n_u8(128);
  if constexpr (K == WeightKind::q8_split) {
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = vreinterpretq_s8_u8(veorq_u8(vsliq_n_u8(u[2 + i], u[i], 4), flip));
      w[2 * i + 1] = vreinterpretq_s8_u8(veorq_u8(vsriq_n_u8(u[i], u[2 + i], 4), flip));
    }
  } else if constexpr (code_bits(K) == 8) {
    for (int i = 0; i < 4; ++i)
      w[i] = vreinterpretq_s8_u8(veorq_u8(u[i / 2 + i % 2 * 2], flip));
  } else {
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = vreinterpretq_s8_u8(vandq_u8(u[i], vdupq_n_u8(15)));
      w[2 * i + 1] = vreinterpretq_s8_u8(vshrq_n_u8(u[i], 4));
    }
  }
}

// The same of four rows, which lie at `at`.
template <WeightKind K>
inline void unpack(const GroupCodes& at, int half, int8x16_t (&w)[4]) {
  uint8x16_t u[kHalfLines<K>];
  for (int i = 0; i < kHalfLines<K>; ++i) u[i] = vld1q_u8(line_of<K>(at, half, i));
  codes_of<K>(u, w);
}

// By pairs of rows: w[0] and w[1] are of rows 0 and 1, w[2] and w[3] of rows 2 and 3; the even ones
// have columns 0..3 and 8..11 of a row beside each other, the odd ones the other columns.
template <WeightKind K>
inline void unpack_pairs(const GroupCodes& at, int half, int8x16_t (&w)[4]) {
  uint8x16_t u[kHalfLines<K>];
  for (int i = 0; i < kHalfLines<K>; i += 2) {
    const uint32x4_t one = vreinterpretq_u32_u8(vld1q_u8(line_of<K>(at, half, i)));
    const uint32x4_t other = vreinterpretq_u32_u8(vld1q_u8(line_of<K>(at, half, i + 1)));
    u[i] = vreinterpretq_u8_u32(vzip1q_u32(one, other));
    u[i + 1] = vreinterpretq_u8_u32(vzip2q_u32(one, other));
  }
  codes_of<K>(u, w);
}

// What a group's dot products start from, so that they end as the sum of (code - zero) * x for
// symmetric kinds and of code * x for others; corrections are -8 * sum(x).
template <WeightKind K>
inline int32x4_t start_dot(int32x4_t corrections) {
  constexpr bool symmetric = offset_of(K) == Offset::none;
  if constexpr (code_bits(K) == 8)
    return symmetric ? vdupq_n_s32(0) : vnegq_s32(vshlq_n_s32(corrections, 4));
  return symmetric ? corrections : vdupq_n_s32(0);
}

// The scales of some rows' groups, and what their offsets add for a sum of activations of 1.
template <WeightKind K>
struct Scaling {
  static constexpr Offset kOffset = offset_of(K);
  const uint8_t *scales, *offsets;

  Scaling(const uint8_t* block, const BlockLayout& layout, size_t row)
      : scales(block + layout.scales + row * 2),
        offsets(block + layout.offsets + row * (kOffset == Offset::minimum ? 2 : 1)) {}
  void load4(size_t g, float32x4_t& scale, float32x4_t& minimum) const {
    scale = load_half4(scales + g * 32);
    if constexpr (kOffset == Offset::minimum) minimum = load_half4(offsets + g * 32);
    if constexpr (kOffset == Offset::zero_point) {
      uint32_t four;
      __builtin_memcpy(&four, offsets + g * 16, 4);
      const uint16x8_t zeros = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
      minimum = vmulq_f32(vnegq_f32(scale), vcvtq_f32_u32(vmovl_u16(vget_low_u16(zeros))));
    }
  }
  void load16(size_t g, V16& scale, V16& minimum) const {
    scale = load_half16(scales + g * 32);
    if constexpr (kOffset == Offset::minimum) minimum = load_half16(offsets + g * 32);
    if constexpr (kOffset == Offset::zero_point) {
      const uint8x16_t zeros = vld1q_u8(offsets + g * 16);
      const uint16x8_t low = vmovl_u8(vget_low_u8(zeros)), high = vmovl_high_u8(zeros);
      const uint32x4_t four[4] = {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low),
                                  vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)};
      minimum =
          map([&](int i) { return vmulq_f32(vnegq_f32(scale.v[i]), vcvtq_f32_u32(four[i])); });
    }
  }
};

// f(0) to f(N - 1), written out, so that arrays are registers.
template <typename F, size_t... I>
inline void unroll(std::index_sequence<I...>, F&& f) {
  (f(static_cast<int>(I)), ...);
}
template <size_t N, typename F>
inline void unroll(F&& f) {
  unroll(std::make_index_sequence<N>(), f);
}

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

// Bytes of a block that belong to one group.
template <WeightKind K>
constexpr size_t kGroupBytes = group_bytes(K) * (K == WeightKind::q8_split ? 2 : 1) + 32 +
                               (offset_of(K) == Offset::minimum      ? 32
                                : offset_of(K) == Offset::zero_point ? 16
                                                                     : 0);

// One token times `count` blocks of sixteen rows. Lines are asked for while others are computed with.
template <WeightKind K>
void matmul_one(const uint8_t* block, size_t count, size_t cols, const ActivationTile& tile,
                float* out) {
  constexpr size_t kLines = (2 * kGroupBytes<K> + 63) / 64;  // of two groups
  const BlockLayout layout = block_layout(K, cols);
  const size_t groups = cols / kGroup;
  const ActivationTile x = tile;  // in registers, whatever finish() makes of memory
  size_t asking = tile.ahead ? start_asking(*tile.ahead, count * layout.bytes / 64) : 0;
  asking = (asking + kLines - 1) / kLines;
  for (; count--; block += layout.bytes, out += kBlockRows) {
    const Scaling<K> scaling(block, layout, 0);
    V16 acc = zero();
    const auto add_group = [&](size_t g) __attribute__((always_inline)) {
      const int8x16_t columns[2] = {vld1q_s8(x.codes + g * kGroup),
                                    vld1q_s8(x.codes + g * kGroup + 16)};
      int32x4_t dot[4];
      for (auto& sum : dot) sum = start_dot<K>(vld1q_dup_s32(x.corrections + g));
      const GroupCodes group{block + g * group_bytes(K),
                             block + layout.offsets + g * group_bytes(K)};
      for (int half = 0; half < 2; ++half) {
        uint8x16_t lines[kHalfLines<K>][4];
        for (int k = 0; k < kHalfLines<K>; ++k)
          for (int i = 0; i < 4; ++i) lines[k][i] = vld1q_u8(line_of<K>(group, half, k) + 16 * i);
        for (int i = 0; i < 4; ++i) {
          uint8x16_t u[kHalfLines<K>];
          for (int k = 0; k < kHalfLines<K>; ++k) u[k] = lines[k][i];
          int8x16_t w[4];
          codes_of<K>(u, w);
          dot[i] = vdotq_laneq_s32(dot[i], w[0], columns[half], 0);
          dot[i] = vdotq_laneq_s32(dot[i], w[1], columns[half], 1);
          dot[i] = vdotq_laneq_s32(dot[i], w[2], columns[half], 2);
          dot[i] = vdotq_laneq_s32(dot[i], w[3], columns[half], 3);
        }
        finish_all(dot);
      }
      V16 scale, minimum = zero();
      scaling.load16(g, scale, minimum);
      acc = map([&](int i) {
        return vfmaq_f32(acc.v[i], vcvtq_f32_s32(dot[i]), vmulq_n_f32(scale.v[i], x.scales[g]));
      });
      if constexpr (offset_of(K) != Offset::none)
        acc = map([&](int i) { return vfmaq_n_f32(acc.v[i], minimum.v[i], x.sums[g]); });
      finish_all(acc.v);
    };
    size_t g = 0;
    while (g + 2 <= groups) {
      // Without a need to ask, the lines are those that are read next: that costs nothing.
      ReadRun run{block + g * group_bytes(K), groups / 2 - g / 2};
      if (asking) {
        run = next_run(*tile.ahead, kLines, run.steps < asking ? run.steps : asking);
        asking -= run.steps;
      }
      for (const size_t end = g + 2 * run.steps; g < end; g += 2, run.line += 64 * kLines) {
        for (size_t i = 0; i < kLines; ++i) __builtin_prefetch(run.line + 64 * i, 0, 2);
        add_group(g);
        add_group(g + 1);
      }
    }
    if (g < groups) add_group(g);
    store(out, acc);
  }
}

// Four rows of a block, from `row` on, times tokens [first, first + T) of the tile: what a path
// defines.
template <WeightKind K, int T>
void matmul_rows(const uint8_t* block, size_t cols, size_t row, const ActivationTile& tile,
                 size_t first, float* out, size_t out_stride);

template <WeightKind K, int T>
inline void matmul_tokens(const uint8_t* block, size_t cols, const ActivationTile& tile, float* out,
                          size_t out_stride) {
  for (size_t first = 0; first + T <= tile.tokens; first += T)
    for (size_t row = 0; row < kBlockRows; row += 4)
      matmul_rows<K, T>(block, cols, row, tile, first, out + first * out_stride + row, out_stride);
}

template <WeightKind K>
void matmul(const uint8_t* blocks, size_t count, size_t cols, const ActivationTile& tile,
            float* out, size_t out_stride) {
  if (tile.tokens == 1) return matmul_one<K>(blocks, count, cols, tile, out);
  const size_t block_bytes = block_layout(K, cols).bytes;
  for (size_t b = 0; b < count; ++b, blocks += block_bytes, out += kBlockRows) {
    if (tile.ahead) use_lines(*tile.ahead, block_bytes / 64);
    if (tile.tokens >= kMostTokens)
      matmul_tokens<K, kMostTokens>(blocks, cols, tile, out, out_stride);
    else if (tile.tokens == 8)
      matmul_tokens<K, 8>(blocks, cols, tile, out, out_stride);
    else if (tile.tokens == 4)
      matmul_tokens<K, 4>(blocks, cols, tile, out, out_stride);
    else
      matmul_tokens<K, 2>(blocks, cols, tile, out, out_stride);
  }
}
