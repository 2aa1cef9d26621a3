// The quantized matrix product on NEON for codes of 4 and 8 bits with fp16 scales of 32 columns:
// decoding takes sixteen rows at a time, prompts take four around matmul_rows, which each path
// defines. Included by kernels_neon.inl.

static constexpr bool is_half_scaled(const Form& form) {
  return form.scaling == Scaling::half && form.scale_columns == kGroup &&
         form.table == Table::none && (form.bits == 4 || form.bits == 8);
}

// The codes of one group, from some row on; split ones have their low nibbles elsewhere.
struct GroupCodes {
  const uint8_t *codes, *low;
};

// Sixteen columns of a group lie in so many 64-byte lines, from column 16 * half on. This, line_of
// and codes_of are what a kind of weights must define for every kernel here.
template <WeightKind K>
constexpr int kHalfLines = form_of(K).bits == 8 ? 4 : 2;

// The lines, those that belong together next to each other: of nibbles, columns 0..7 and 8..15; of
// bytes, columns 0..3 and 8..11, then the others.
template <WeightKind K>
inline const uint8_t* line_of(const GroupCodes& at, int half, int line) {
  if constexpr (form_of(K).split)
    return (line < 2 ? at.codes : at.low) + half * 128 + line % 2 * 64;
  else if constexpr (form_of(K).bits == 8)
    return at.codes + half * 256 + line % 2 * 128 + line / 2 * 64;
  else
    return at.codes + half * 128 + line * 64;
}

// What is in a quarter of these lines as signed bytes, four rows with four columns each: w[k] has
// columns 4k..4k+3. 8-bit codes lose 128 here, which start_dot makes up for.
template <WeightKind K>
inline void codes_of(const uint8x16_t (&u)[kHalfLines<K>], int8x16_t (&w)[4]) {
  const uint8x16_t flip = vdupq_n_u8(128);
  if constexpr (form_of(K).split) {
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = vreinterpretq_s8_u8(veorq_u8(vsliq_n_u8(u[2 + i], u[i], 4), flip));
      w[2 * i + 1] = vreinterpretq_s8_u8(veorq_u8(vsriq_n_u8(u[i], u[2 + i], 4), flip));
    }
  } else if constexpr (form_of(K).bits == 8) {
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
inline int32x4_t start_dots(int32x4_t corrections) {
  constexpr bool symmetric = form_of(K).offset == Offset::none;
  if constexpr (form_of(K).bits == 8)
    return symmetric ? vdupq_n_s32(0) : vnegq_s32(vshlq_n_s32(corrections, 4));
  return symmetric ? corrections : vdupq_n_s32(0);
}

// The scales of some rows' groups, and what their offsets add for a sum of activations of 1.
template <WeightKind K>
struct RowScales {
  static constexpr Offset kOffset = form_of(K).offset;
  const uint8_t *scales, *offsets;

  RowScales(const uint8_t* block, const BlockLayout& layout, size_t row)
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

// Bytes of a block that belong to one group.
template <WeightKind K>
constexpr size_t kGroupBytes = group_bytes(form_of(K)) * (form_of(K).split ? 2 : 1) + 32 +
                               (form_of(K).offset == Offset::minimum      ? 32
                                : form_of(K).offset == Offset::zero_point ? 16
                                                                     : 0);

// One token times N blocks of sixteen rows, which share what is read of the token. Lines are asked for
// while others are computed with, in up to `asking` steps.
template <WeightKind K, int N>
inline void multiply_one(const Blocks& first, size_t cols, const ActivationTile& x, size_t& asking,
                         float* out) {
  constexpr size_t kLines = (2 * N * kGroupBytes<K> + 63) / 64;  // of two groups
  const BlockLayout layout = block_layout(K, cols);
  const size_t groups = cols / kGroup;
  const auto of = [&](int n) { return first.from(static_cast<size_t>(n)); };
  V16 acc[N];
  unrolled<N>([&](auto n) __attribute__((always_inline)) { acc[n] = zero(); });
  const auto add_group = [&](size_t g) __attribute__((always_inline)) {
    const int8x16_t columns[2] = {vld1q_s8(x.codes + g * kGroup),
                                  vld1q_s8(x.codes + g * kGroup + 16)};
    const int32x4_t start = start_dots<K>(vld1q_dup_s32(x.corrections + g));
    const float factor = x.scales[g], total = form_of(K).offset == Offset::none ? 0 : x.sums[g];
    unrolled<N>([&](auto n) __attribute__((always_inline)) {
      const Blocks block = of(n);
      int32x4_t dot[4] = {start, start, start, start};
      const GroupCodes group{block.data + g * group_bytes(form_of(K)), low_of<K>(block, g)};
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
      RowScales<K>(block.data, layout, 0).load16(g, scale, minimum);
      V16& sum = acc[n];
      sum = map([&](int i) {
        return vfmaq_f32(sum.v[i], vcvtq_f32_s32(dot[i]), vmulq_n_f32(scale.v[i], factor));
      });
      if constexpr (form_of(K).offset != Offset::none)
        sum = map([&](int i) { return vfmaq_n_f32(sum.v[i], minimum.v[i], total); });
      finish_all(sum.v);
    });
  };
  size_t g = 0;
  while (g + 2 <= groups) {
    // Without a need to ask, the lines are those that are read next: that costs nothing.
    ReadRun run{first.data + g * group_bytes(form_of(K)), groups / 2 - g / 2};
    if (asking) {
      run = next_run(*x.ahead, kLines, run.steps < asking ? run.steps : asking);
      asking -= run.steps;
    }
#if defined(__clang__)
#pragma clang loop unroll_count(2)
#endif
    for (const size_t end = g + 2 * run.steps; g < end; g += 2, run.line += 64 * kLines) {
      for (size_t i = 0; i < kLines; ++i) __builtin_prefetch(run.line + 64 * i, 0, 2);
      add_group(g);
      add_group(g + 1);
    }
  }
  if (g < groups) add_group(g);
  unrolled<N>([&](auto n) __attribute__((always_inline)) { store(out + n * kBlockRows, acc[n]); });
}

template <WeightKind K>
void matmul_one(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
                float* out) {
  constexpr size_t kPairLines = (4 * kGroupBytes<K> + 63) / 64;  // of two groups of two blocks
  const ActivationTile x = tile;  // in registers, whatever finish() makes of memory
  const size_t lines = count * lines_read<K>(blocks, block_layout(K, cols));
  size_t asking = tile.ahead ? (start_asking(*tile.ahead, lines) + kPairLines - 1) / kPairLines : 0;
  size_t b = 0;
  for (; b + 2 <= count; b += 2)
    multiply_one<K, 2>(blocks.from(b), cols, x, asking, out + b * kBlockRows);
  if (b < count) multiply_one<K, 1>(blocks.from(b), cols, x, asking, out + b * kBlockRows);
}

// Four rows of a block, from `row` on, times tokens [first, first + T) of the tile: what a path
// defines.
template <WeightKind K, int T>
void matmul_rows(const Blocks& block, size_t cols, size_t row, const ActivationTile& tile,
                 size_t first, float* out, size_t out_stride);

template <WeightKind K, int T>
inline void matmul_tokens(const Blocks& block, size_t cols, const ActivationTile& tile, float* out,
                          size_t out_stride) {
  for (size_t first = 0; first + T <= tile.tokens; first += T)
    for (size_t row = 0; row < kBlockRows; row += 4)
      matmul_rows<K, T>(block, cols, row, tile, first, out + first * out_stride + row, out_stride);
}

template <WeightKind K>
void matmul_half(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
                 float* out, size_t out_stride) {
  if (tile.tokens == 1) return matmul_one<K>(blocks, count, cols, tile, out);
  const size_t lines = lines_read<K>(blocks, block_layout(K, cols));
  for (size_t b = 0; b < count; ++b, out += kBlockRows) {
    const Blocks block = blocks.from(b);
    if (tile.ahead) use_lines(*tile.ahead, lines);
    if (tile.tokens >= kMostTokens)
      matmul_tokens<K, kMostTokens>(block, cols, tile, out, out_stride);
    else if (tile.tokens == 8)
      matmul_tokens<K, 8>(block, cols, tile, out, out_stride);
    else if (tile.tokens == 4)
      matmul_tokens<K, 4>(block, cols, tile, out, out_stride);
    else
      matmul_tokens<K, 2>(block, cols, tile, out, out_stride);
  }
}
