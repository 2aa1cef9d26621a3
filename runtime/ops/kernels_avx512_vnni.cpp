// AVX-512 with VNNI (F, BW, VL, DQ, VNNI): one vpdpbusd per 64-byte line of codes.
#include <immintrin.h>

#include "kernels.h"

namespace pocketslm {
namespace {

struct V16 {
  __m512 v;
};
inline V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V16 a) { _mm512_storeu_ps(p, a.v); }
inline V16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline V16 zero() { return {_mm512_setzero_ps()}; }
inline V16 add(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V16 sub(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V16 mul(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V16 div(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V16 max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V16 min(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V16 abs(V16 a) { return {_mm512_abs_ps(a.v)}; }
inline V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V16 round_even(V16 a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline V16 round_down(V16 a) { return {_mm512_roundscale_ps(a.v, 1)}; }
// p * 2^n for whole n, where both p and that are normal numbers.
inline V16 times_power_of_two(V16 p, V16 n) { return {_mm512_scalef_ps(p.v, n.v)}; }
inline __m256 upper_half(__m512 v) { return _mm512_extractf32x8_ps(v, 1); }
inline float reduce_add(V16 a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper_half(a.v));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float reduce_max(V16 a) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), upper_half(a.v));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
// Magnitudes are compared by their bits, in which NaN is the largest.
inline V16 larger_magnitude(V16 peaks, V16 a) {
  return {_mm512_castsi512_ps(
      _mm512_max_epi32(_mm512_castps_si512(peaks.v), _mm512_castps_si512(abs(a).v)))};
}
inline float reduce_magnitude(V16 peaks) {
  const __m512i v = _mm512_castps_si512(peaks.v);
  const __m256i h = _mm256_max_epi32(_mm512_castsi512_si256(v), _mm512_extracti32x8_epi32(v, 1));
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1))));
}
inline V16 load_kv(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline V16 load_kv(const float* p) { return load(p); }
inline V16 load_factor(const uint16_t* p) { return load_kv(p); }
inline V16 load_factor(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
inline void store_f16(uint16_t* p, V16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Rounds to int8, stores, and gives the sum of the stored codes.
inline int32_t store_i8(int8_t* p, V16 a) {
  const __m512i codes = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(codes));
  return _mm512_reduce_add_epi32(codes);
}
// Whole numbers up to 127 * 128, rounded to these, in two digits.
inline void store_digits(int8_t* high, int8_t* low, V16 a) {
  const __m512i codes = _mm512_cvtps_epi32(a.v);
  const __m512i rest = _mm512_and_si512(codes, _mm512_set1_epi32(127));
  _mm_store_si128(reinterpret_cast<__m128i*>(high),
                  _mm512_cvtepi32_epi8(_mm512_srli_epi32(codes, 7)));
  _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(rest));
}
constexpr size_t kMaxRegisterRows = 12, kAccumulators = 12;

// What was loaded stays in its register: GCC would load it again for each use.
inline void hold(__m512i& v) { __asm__("" : "+v"(v)); }

// Dot products of int8. One operand must be unsigned: lines with 128 added, or the factors.
struct I16 {
  __m512i v;
};
struct Quad {
  __m512i v;
};
inline __m512i broadcast4(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}
inline I16 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Quad load_quad(const int8_t* p) { return {broadcast4(p)}; }
// In assembly, since GCC 12 copies every accumulator twice and stores it too.
inline void add_dots(I16& acc, __m512i factors, __m512i codes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(factors), "v"(codes));
}
// With the four bytes at `factors`, which the instruction itself repeats.
inline void add_dots(__m512i& acc, __m512i codes, const int8_t* factors) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(acc)
          : "v"(codes), "m"(*reinterpret_cast<const int8_t(*)[4]>(factors)));
}
struct SignedLine {
  static constexpr int32_t kBias = 128;
  __m512i v;
  SignedLine() = default;
  explicit SignedLine(const int8_t* p)
      : v(_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))) {
    hold(v);
  }
  void dot(I16& acc, Quad quad) const { add_dots(acc, v, quad.v); }
};
struct UnsignedLine {
  __m512i v;
  UnsignedLine() = default;
  explicit UnsignedLine(const int8_t* p) : v(_mm512_loadu_si512(p)) { hold(v); }
  void dot(I16& acc, Quad quad) const { add_dots(acc, quad.v, v); }
};
inline I16 join_digits(I16 high, I16 low) {
  return {_mm512_add_epi32(_mm512_slli_epi32(high.v, 7), low.v)};
}
inline V16 to_float(I16 x) { return {_mm512_cvtepi32_ps(x.v)}; }
constexpr size_t kDotRows = 6, kDotAccumulators = 24, kMaxDotPanels = 4;

#include "kernels_vector.inl"

inline __m512 load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

// Bits to the left, or to the right where By is negative; bits of the next byte are masked later.
template <int By>
inline __m512i moved(__m512i v) {
  if constexpr (By > 0) return _mm512_slli_epi16(v, By);
  if constexpr (By < 0) return _mm512_srli_epi16(v, -By);
  return v;
}

inline __m512i load_line(const uint8_t* p) { return _mm512_load_si512(p); }

// The eight code vectors of one group, unsigned; a table's values lie on 128. `low` is where split
// codes have their low nibbles.
template <WeightKind K>
inline void load_codes(const uint8_t* p, const uint8_t* low, __m512i (&w)[8]) {
  constexpr Form form = form_of(K);
  constexpr int first = static_cast<int>(low_bits(form)), rest = static_cast<int>(form.bits) - first;
  if constexpr (form.split) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int j = 0; j < 4; ++j) {
      const __m512i high = load_line(p + 64 * j), nibbles = load_line(low + 64 * j);
      // Bitwise choice: 0xca takes the second operand where the first is set, else the third.
      w[2 * j] = _mm512_ternarylogic_epi32(mask, nibbles, _mm512_slli_epi16(high, 4), 0xca);
      w[2 * j + 1] = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(nibbles, 4), high, 0xca);
    }
    return;
  } else if constexpr (first == 8) {
    for (int j = 0; j < 8; ++j) w[j] = load_line(p + 64 * j);
    return;
  }
  constexpr int per_line = 8 / first;
  const __m512i mask = _mm512_set1_epi8((1 << first) - 1);
  unrolled<8>([&](auto index) {
    constexpr int j = index, i = j % per_line;
    w[j] = _mm512_and_si512(moved<-first * i>(load_line(p + 64 * (j / per_line))), mask);
  });
  if constexpr (!form.split && rest > 0) {
    constexpr int rest_per_line = 8 / rest;
    const __m512i rest_mask = _mm512_set1_epi8(((1 << rest) - 1) << first);
    unrolled<8>([&](auto index) {
      constexpr int j = index, i = j % rest_per_line;
      const __m512i line = load_line(p + 64 * first + 64 * (j / rest_per_line));
      // 0xea is (a & b) | c.
      w[j] = _mm512_ternarylogic_epi32(moved<first - rest * i>(line), rest_mask, w[j], 0xea);
    });
  }
  if constexpr (form.table != Table::none) {
    const int8_t* values = form.table == Table::iq4 ? kIq4Values : kFp4Values;
    const __m128i signed_values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m512i table = _mm512_broadcast_i32x4(_mm_xor_si128(signed_values, _mm_set1_epi8(-128)));
    for (auto& v : w) v = _mm512_shuffle_epi8(table, v);
  }
}

inline __m512 from_bytes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }

// The scales and minimums of group g: one of each, or two where they are of 16 columns.
template <WeightKind K>
inline void load_scales(const uint8_t* scales, const uint8_t* offsets, size_t g,
                        __m512 (&scale)[kScales<K>], __m512 (&minimum)[kScales<K>]) {
  constexpr Form form = form_of(K);
  if constexpr (form.scaling == Scaling::half) {
    scale[0] = load_f16(scales + g * 32);
    if constexpr (form.offset == Offset::minimum) minimum[0] = load_f16(offsets + g * 32);
    if constexpr (form.offset == Offset::zero_point) {
      const __m128i zeros = _mm_load_si128(reinterpret_cast<const __m128i*>(offsets + g * 16));
      minimum[0] = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), scale[0]), from_bytes(zeros));
    }
  } else {
    constexpr Factored parts = factored(form);
    constexpr size_t groups = form.factor_columns / kGroup;
    const uint8_t* super = scales + g / groups * parts.bytes;
    const __m512 factor = load_f16(super);
    for (int i = 0; i < kScales<K>; ++i) {
      const size_t entry = g % groups * kScales<K> + static_cast<size_t>(i);
      const __m128i* p = reinterpret_cast<const __m128i*>(super + parts.first + entry * parts.step);
      const __m128i bytes = _mm_load_si128(p);
      if constexpr (form.offset == Offset::none) {
        scale[i] = _mm512_mul_ps(factor, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
      } else {
        const __m128i mask = _mm_set1_epi8(15);
        constexpr bool nibbles = form.scaling == Scaling::nibble;
        const __m128i low = nibbles ? _mm_and_si128(bytes, mask) : bytes;
        const __m128i lowest = nibbles ? _mm_and_si128(_mm_srli_epi16(bytes, 4), mask)
                                       : _mm_load_si128(p + 1);
        const __m512 factors = _mm512_sub_ps(_mm512_setzero_ps(), load_f16(super + 32));
        scale[i] = _mm512_mul_ps(factor, from_bytes(low));
        minimum[i] = _mm512_mul_ps(factors, from_bytes(lowest));
      }
    }
  }
}

template <WeightKind K, int M>
void matmul_tile(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
                 float* out, size_t out_stride) {
  constexpr Form form = form_of(K);
  constexpr int S = kScales<K>;
  constexpr int T = M < 4 ? M : 4;  // tokens whose products are in the making: each waits for itself
  const BlockLayout layout = block_layout(K, cols);
  const size_t groups = cols / kGroup;
  const size_t block_lines = lines_read<K>(blocks, layout);
  const size_t group_lines = (block_lines + groups - 1) / groups;
  for (size_t b = 0; b < count; ++b) {
    const Blocks block = blocks.from(b);
    const int8_t* x = tile.codes;
    size_t lines_left = block_lines;
    __m512 acc[M];
    for (int t = 0; t < M; ++t) acc[t] = _mm512_setzero_ps();
    for (size_t g = 0; g < groups; ++g) {
      if (tile.ahead && lines_left) {
        const size_t lines = group_lines < lines_left ? group_lines : lines_left;
        use_lines(*tile.ahead, lines);
        lines_left -= lines;
      }
      __m512i w[8];
      __m512 scale[S], minimum[S];
      load_codes<K>(block.data + g * group_bytes(form), low_of<K>(block, g), w);
      load_scales<K>(block.data + layout.scales, block.data + layout.offsets, g, scale, minimum);
      for (int first = 0; first < M; first += T, x += T * kGroup) {
        const size_t at = g * M + static_cast<size_t>(first);
        for (int i = 0; i < S; ++i) {
          __m512i dot[T];
          for (int t = 0; t < T; ++t)
            dot[t] = form.offset == Offset::none
                         ? _mm512_set1_epi32(zero_correction<K>(tile, at + t, i))
                         : _mm512_setzero_si512();
          for (int j = 8 / S * i; j < 8 / S * (i + 1); ++j)
            for (int t = 0; t < T; ++t) add_dots(dot[t], w[j], x + t * kGroup + 4 * j);
          for (int t = 0; t < T; ++t) {
            __m512& sum = acc[first + t];
            const __m512 factor = _mm512_mul_ps(scale[i], _mm512_set1_ps(tile.scales[at + t]));
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t]), factor, sum);
            if constexpr (form.offset != Offset::none)
              sum = _mm512_fmadd_ps(minimum[i], _mm512_set1_ps(part_sum<K>(tile, at + t, i)), sum);
          }
        }
      }
    }
    for (int t = 0; t < M; ++t) _mm512_storeu_ps(out + t * out_stride + b * kBlockRows, acc[t]);
  }
}

template <WeightKind K>
void matmul(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
            float* out, size_t out_stride) {
  switch (tile.tokens) {
    case 16:
      return matmul_tile<K, 16>(blocks, count, cols, tile, out, out_stride);
    case 8:
      return matmul_tile<K, 8>(blocks, count, cols, tile, out, out_stride);
    case 4:
      return matmul_tile<K, 4>(blocks, count, cols, tile, out, out_stride);
    case 2:
      return matmul_tile<K, 2>(blocks, count, cols, tile, out, out_stride);
    default:
      return matmul_tile<K, 1>(blocks, count, cols, tile, out, out_stride);
  }
}

uint64_t int8_probe(size_t iterations) {
  __m512i acc[12], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (auto& x : acc) x = _mm512_setzero_si512();
  for (size_t i = 0; i < iterations; ++i) {
    for (auto& x : acc) x = _mm512_dpbusd_epi32(x, a, b);
    __asm__ volatile("" : "+v"(a), "+v"(b));
  }
  for (auto& x : acc) __asm__ volatile("" : "+v"(x));
  return iterations * 12 * 64;
}

}  // namespace

const Kernels kAvx512VnniKernels = POCKETSLM_KERNELS("avx512_vnni");

}  // namespace pocketslm
