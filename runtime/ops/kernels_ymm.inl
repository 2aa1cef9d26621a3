// Sixteen floats and the rows of a block in two registers of 256 bits: AVX2, with FMA and F16C. Include
// inside an anonymous namespace after add_dots and kWideDots, which says whether any unsigned and
// signed bytes may be given to it.

struct V16 {
  __m256 a, b;
};
inline V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline V16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V16 zero() { return set1(0.0f); }
inline V16 add(V16 x, V16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V16 sub(V16 x, V16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V16 mul(V16 x, V16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V16 div(V16 x, V16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V16 max(V16 x, V16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V16 min(V16 x, V16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline V16 abs(V16 x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline V16 fma(V16 x, V16 y, V16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline V16 round_even(V16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline V16 round_down(V16 x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
// p * 2^n for whole n, where both p and that are normal numbers: n is added to the exponent.
inline __m256 times_power_of_two(__m256 p, __m256 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}
inline V16 times_power_of_two(V16 p, V16 n) {
  return {times_power_of_two(p.a, n.a), times_power_of_two(p.b, n.b)};
}
inline float reduce_add(V16 x) {
  const __m256 h = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float reduce_max(V16 x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
// Magnitudes are compared by their bits, in which NaN is the largest.
inline __m256 larger(__m256 x, __m256 y) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
}
inline V16 larger_magnitude(V16 peaks, V16 x) {
  const V16 magnitude = abs(x);
  return {larger(peaks.a, magnitude.a), larger(peaks.b, magnitude.b)};
}
inline float reduce_magnitude(V16 peaks) {
  const __m256i h = _mm256_castps_si256(larger(peaks.a, peaks.b));
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1))));
}
inline __m256 load_half8(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline V16 load_kv(const uint16_t* p) { return {load_half8(p), load_half8(p + 8)}; }
inline __m256 load_bytes8(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline V16 load_kv(const float* p) { return load(p); }
inline V16 load_factor(const uint16_t* p) { return load_kv(p); }
inline V16 load_factor(const int8_t* p) { return {load_bytes8(p), load_bytes8(p + 8)}; }
inline void store_f16(uint16_t* p, V16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, mode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, mode));
}
inline int32_t store_i8(int8_t* p, V16 x) {
  const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
  // Packing works within 128-bit lanes; the permutation puts the quarters back in order.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  const __m256i h = _mm256_add_epi32(a, b);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
// Whole numbers up to 127 * 128, rounded to these, in two digits.
inline void store_digits(int8_t* high, int8_t* low, V16 x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  const __m256i rest = _mm256_and_si256(words, _mm256_set1_epi16(127));
  const __m256i bytes = _mm256_packus_epi16(_mm256_srli_epi16(words, 7), rest);
  // Packing works within 128-bit lanes: of the four of each, 0..3 and 8..11 lie in the lower one.
  const __m256i ordered =
      _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm256_castsi256_si128(ordered));
  _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm256_extracti128_si256(ordered, 1));
}
constexpr size_t kMaxRegisterRows = 6, kAccumulators = 4;

// Dot products of int8. One operand must be unsigned: magnitudes of the lines, whose signs the
// factors take over, or the factors.
struct I16 {
  __m256i a, b;
};
struct Quad {
  __m256i v;
};
inline I16 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Quad load_quad(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return {_mm256_set1_epi32(quad)};
}
struct UnsignedLine {
  __m256i a, b;
  UnsignedLine() = default;
  explicit UnsignedLine(const int8_t* p)
      : a(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
        b(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))) {}
  void dot(I16& acc, Quad quad) const {
    acc = {add_dots(acc.a, quad.v, a), add_dots(acc.b, quad.v, b)};
  }
};
struct SignedLine : UnsignedLine {
  static constexpr int32_t kBias = 0;
  using UnsignedLine::UnsignedLine;
  void dot(I16& acc, Quad quad) const {
    acc = {add_dots(acc.a, _mm256_abs_epi8(a), _mm256_sign_epi8(quad.v, a)),
           add_dots(acc.b, _mm256_abs_epi8(b), _mm256_sign_epi8(quad.v, b))};
  }
};
inline __m256i join_digits(__m256i high, __m256i low) {
  return _mm256_add_epi32(_mm256_slli_epi32(high, 7), low);
}
inline I16 join_digits(I16 high, I16 low) {
  return {join_digits(high.a, low.a), join_digits(high.b, low.b)};
}
inline V16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
constexpr size_t kDotRows = 3, kDotAccumulators = 6, kMaxDotPanels = 1;

#include "kernels_vector.inl"

inline __m256i load_line(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

// Bits to the left, or to the right where By is negative; bits of the next byte are masked later.
template <int By>
inline __m256i moved(__m256i v) {
  if constexpr (By > 0) return _mm256_slli_epi16(v, By);
  if constexpr (By < 0) return _mm256_srli_epi16(v, -By);
  return v;
}

// The code vectors of one group for eight rows, unsigned; a table's values lie on 128. `low` is where
// split codes have their low nibbles.
template <WeightKind K>
inline void load_codes(const uint8_t* p, const uint8_t* low, __m256i (&w)[8]) {
  constexpr Form form = form_of(K);
  constexpr int first = static_cast<int>(low_bits(form)), rest = static_cast<int>(form.bits) - first;
  if constexpr (form.split) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int j = 0; j < 4; ++j) {
      const __m256i high = load_line(p + 64 * j), nibbles = load_line(low + 64 * j);
      w[2 * j] = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(high, mask), 4),
                                 _mm256_and_si256(nibbles, mask));
      w[2 * j + 1] = _mm256_or_si256(_mm256_andnot_si256(mask, high),
                                     _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), mask));
    }
    return;
  } else if constexpr (first == 8) {
    for (int j = 0; j < 8; ++j) w[j] = load_line(p + 64 * j);
    return;
  }
  constexpr int per_line = 8 / first;
  const __m256i mask = _mm256_set1_epi8((1 << first) - 1);
  unrolled<8>([&](auto index) {
    constexpr int j = index, i = j % per_line;
    w[j] = _mm256_and_si256(moved<-first * i>(load_line(p + 64 * (j / per_line))), mask);
  });
  if constexpr (!form.split && rest > 0) {
    constexpr int rest_per_line = 8 / rest;
    const __m256i rest_mask = _mm256_set1_epi8(((1 << rest) - 1) << first);
    unrolled<8>([&](auto index) {
      constexpr int j = index, i = j % rest_per_line;
      const __m256i line = load_line(p + 64 * first + 64 * (j / rest_per_line));
      w[j] = _mm256_or_si256(w[j], _mm256_and_si256(moved<first - rest * i>(line), rest_mask));
    });
  }
  if constexpr (form.table != Table::none) {
    const int8_t* values = form.table == Table::iq4 ? kIq4Values : kFp4Values;
    const __m128i signed_values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_xor_si128(signed_values, _mm_set1_epi8(-128)));
    for (auto& v : w) v = _mm256_shuffle_epi8(table, v);
  }
}

inline __m128i load_bytes(const uint8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
inline __m256 from_bytes(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); }

// The scales and minimums of group g for eight rows: one of each, or two where they are of 16 columns.
template <WeightKind K>
inline void load_scales(const uint8_t* scales, const uint8_t* offsets, size_t g, size_t half,
                        __m256 (&scale)[kScales<K>], __m256 (&minimum)[kScales<K>]) {
  constexpr Form form = form_of(K);
  if constexpr (form.scaling == Scaling::half) {
    scale[0] = load_half8(scales + g * 32 + half * 16);
    if constexpr (form.offset == Offset::minimum)
      minimum[0] = load_half8(offsets + g * 32 + half * 16);
    if constexpr (form.offset == Offset::zero_point)
      minimum[0] = _mm256_mul_ps(_mm256_sub_ps(_mm256_setzero_ps(), scale[0]),
                                 from_bytes(load_bytes(offsets + g * 16 + half * 8)));
  } else {
    constexpr Factored parts = factored(form);
    constexpr size_t groups = form.factor_columns / kGroup;
    const uint8_t* super = scales + g / groups * parts.bytes;
    const __m256 factor = load_half8(super + half * 16);
    for (int i = 0; i < kScales<K>; ++i) {
      const size_t entry = g % groups * kScales<K> + static_cast<size_t>(i);
      const uint8_t* p = super + parts.first + entry * parts.step + half * 8;
      const __m128i bytes = load_bytes(p);
      if constexpr (form.offset == Offset::none) {
        scale[i] = _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
      } else {
        const __m128i mask = _mm_set1_epi8(15);
        constexpr bool nibbles = form.scaling == Scaling::nibble;
        const __m128i low = nibbles ? _mm_and_si128(bytes, mask) : bytes;
        const __m128i lowest =
            nibbles ? _mm_and_si128(_mm_srli_epi16(bytes, 4), mask) : load_bytes(p + kBlockRows);
        const __m256 factors =
            _mm256_sub_ps(_mm256_setzero_ps(), load_half8(super + 32 + half * 16));
        scale[i] = _mm256_mul_ps(factor, from_bytes(low));
        minimum[i] = _mm256_mul_ps(factors, from_bytes(lowest));
      }
    }
  }
}

inline __m256i broadcast4(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm256_set1_epi32(quad);
}

// Eight rows times quads [begin, end) of one token.
template <WeightKind K, int begin, int end>
inline __m256i group_dot(const __m256i (&w)[8], const int8_t* x) {
  constexpr unsigned bits = value_bits(form_of(K));
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (kWideDots) {
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (int j = begin; j < end; j += 2) {
      even = add_dots(even, w[j], broadcast4(x + 4 * j));
      odd = add_dots(odd, w[j + 1], broadcast4(x + 4 * (j + 1)));
    }
    return _mm256_add_epi32(even, odd);
  } else if constexpr (bits < 8) {
    // So many sums of two products of at most (2^bits - 1) * 127 stay within 16 bits.
    constexpr int run = bits <= 4 ? 8 : bits == 5 ? 4 : 2;
    __m256i total{};
    unrolled<(end - begin + run - 1) / run>([&](auto index) {
      constexpr int first = begin + index * run, last = first + run < end ? first + run : end;
      __m256i sum = _mm256_maddubs_epi16(w[first], broadcast4(x + 4 * first));
      for (int j = first + 1; j < last; ++j)
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[j], broadcast4(x + 4 * j)));
      const __m256i wide = _mm256_madd_epi16(sum, ones);
      total = index == 0 ? wide : _mm256_add_epi32(total, wide);
    });
    return total;
  } else {
    // An unsigned code times int8 overflows 16 bits in pairs. With the low seven bits and the top
    // bit apart, w = low + 128 * top, both products fit.
    const __m256i low_mask = _mm256_set1_epi8(0x7f);
    __m256i low_sum = _mm256_setzero_si256(), top_sum = _mm256_setzero_si256();
    for (int j = begin; j < end; ++j) {
      const __m256i a = broadcast4(x + 4 * j);
      const __m256i top = _mm256_and_si256(_mm256_srli_epi16(w[j], 7), _mm256_set1_epi8(1));
      low_sum = _mm256_add_epi32(
          low_sum, _mm256_madd_epi16(
                       _mm256_maddubs_epi16(_mm256_and_si256(w[j], low_mask), a), ones));
      top_sum = _mm256_add_epi16(top_sum, _mm256_maddubs_epi16(top, a));
    }
    return _mm256_add_epi32(low_sum,
                            _mm256_slli_epi32(_mm256_madd_epi16(top_sum, ones), 7));
  }
}

// Tokens [first, first + M) of the tile for one block, eight rows at a time.
template <WeightKind K, int M>
void matmul_part(const Blocks& block, size_t cols, const ActivationTile& tile, size_t first,
                 float* out, size_t out_stride) {
  constexpr Form form = form_of(K);
  constexpr int S = kScales<K>;
  const BlockLayout layout = block_layout(K, cols);
  for (size_t half = 0; half < 2; ++half) {
    __m256 acc[M];
    for (int t = 0; t < M; ++t) acc[t] = _mm256_setzero_ps();
    for (size_t g = 0; g < cols / kGroup; ++g) {
      __m256i w[8];
      __m256 scale[S], minimum[S];
      load_codes<K>(block.data + half * 32 + g * group_bytes(form),
                    low_of<K>(block, g, half * 32), w);
      load_scales<K>(block.data + layout.scales, block.data + layout.offsets, g, half, scale,
                     minimum);
      for (int t = 0; t < M; ++t) {
        const size_t at = g * tile.tokens + first + static_cast<size_t>(t);
        unrolled<S>([&](auto index) {
          constexpr int i = index;
          __m256i dot = group_dot<K, 8 / S * i, 8 / S * (i + 1)>(w, tile.codes + at * kGroup);
          if constexpr (form.offset == Offset::none)
            dot = _mm256_add_epi32(dot, _mm256_set1_epi32(zero_correction<K>(tile, at, i)));
          const __m256 factor = _mm256_mul_ps(scale[i], _mm256_set1_ps(tile.scales[at]));
          acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, acc[t]);
          if constexpr (form.offset != Offset::none)
            acc[t] = _mm256_fmadd_ps(minimum[i], _mm256_set1_ps(part_sum<K>(tile, at, i)), acc[t]);
        });
      }
    }
    for (size_t t = 0; t < M; ++t)
      _mm256_storeu_ps(out + (first + t) * out_stride + half * 8, acc[t]);
  }
}

template <WeightKind K>
void matmul(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
            float* out, size_t out_stride) {
  const size_t lines = lines_read<K>(blocks, block_layout(K, cols));
  for (size_t b = 0; b < count; ++b, out += kBlockRows) {
    const Blocks block = blocks.from(b);
    if (tile.ahead) use_lines(*tile.ahead, lines);
    // Four accumulators and eight code vectors are what sixteen registers hold.
    size_t t = 0;
    for (; t + 4 <= tile.tokens; t += 4)
      matmul_part<K, 4>(block, cols, tile, t, out, out_stride);
    for (; t < tile.tokens; ++t) matmul_part<K, 1>(block, cols, tile, t, out, out_stride);
  }
}

uint64_t int8_probe(size_t iterations) {
  __m256i acc[8], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  for (auto& x : acc) x = _mm256_setzero_si256();
  for (size_t i = 0; i < iterations; ++i) {
    for (auto& x : acc)
      x = kWideDots ? add_dots(x, a, b) : _mm256_add_epi16(x, _mm256_maddubs_epi16(a, b));
    __asm__ volatile("" : "+x"(a), "+x"(b));
  }
  for (auto& x : acc) __asm__ volatile("" : "+x"(x));
  return iterations * 8 * 32;
}
