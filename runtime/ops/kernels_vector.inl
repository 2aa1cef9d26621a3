// Float kernels written once over V16, sixteen floats in whatever registers the including file's
// instruction set has. The order of every rounding is the same on all of them, so their results
// agree to the last bit. Include inside an anonymous namespace after V16 and its operations.

inline V16 exp16(V16 x) {
  // 2^n * e^r with |r| <= ln(2)/2 and a Taylor polynomial of degree 6 (error below 1 ulp of 2^-22).
  // The order of the operands keeps a NaN: of two, x86 takes the second where either is one.
  x = max(set1(-87.0f), x);
  x = min(set1(88.0f), x);
  const V16 n = round_even(mul(x, set1(1.44269504f)));
  V16 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V16 p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return times_power_of_two(p, n);
}

// 2^x for x up to 0, exact to about 2^-22 of it: 2^floor(x) times a polynomial with the least relative
// error that is 1 at 0. What is smaller than 2^-126 becomes that.
inline V16 exp2_16(V16 x) {
  x = max(set1(-126.0f), x);
  const V16 n = round_down(x), r = sub(x, n);
  V16 p = set1(0.00186895637f);
  p = fma(p, r, set1(0.00901488494f));
  p = fma(p, r, set1(0.0557993017f));
  p = fma(p, r, set1(0.240165651f));
  p = fma(p, r, set1(0.693151057f));
  p = fma(p, r, set1(1.0f));
  return times_power_of_two(p, n);
}

// 1 - 2 / (exp(2x) + 1), exact to about 2^-23 of 1.
inline V16 tanh16(V16 x) {
  return sub(set1(1.0f), div(set1(2.0f), add(exp16(add(x, x)), set1(1.0f))));
}

// x * sigmoid(y)
inline V16 times_sigmoid(V16 x, V16 y) { return div(x, add(exp16(sub(zero(), y)), set1(1.0f))); }

// With the error function's complement by Abramowitz and Stegun, 7.1.26, exact to 1.5e-7.
inline V16 gelu16(V16 x) {
  const V16 size = abs(x);
  const V16 z = mul(size, set1(0.7071067812f));
  const V16 t = div(set1(1.0f), fma(z, set1(0.3275911f), set1(1.0f)));
  V16 p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const V16 complement = mul(mul(p, t), exp16(sub(zero(), mul(z, z))));
  return sub(max(zero(), x), mul(mul(size, set1(0.5f)), complement));
}

template <Activation A>
inline V16 activated(V16 x) {
  if constexpr (A == Activation::silu) return times_sigmoid(x, x);
  // 1 + tanh(u) = 2 * sigmoid(2u)
  if constexpr (A == Activation::gelu_tanh) {
    const V16 cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
    return times_sigmoid(x, mul(cubic, set1(2 * 0.7978845608f)));
  }
  if constexpr (A == Activation::gelu) return gelu16(x);
  const V16 positive = max(zero(), x);
  return A == Activation::relu2 ? mul(positive, positive) : positive;
}

template <Activation A>
void gated(const float* gate, const float* up, size_t n, float* out) {
  for (size_t i = 0; i < n; i += 16)
    store(out + i, mul(activated<A>(load(gate + i)), load(up + i)));
}

template <Activation A>
void activate(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; i += 16) store(out + i, activated<A>(load(x + i)));
}

inline V16 capped(V16 x, float cap) { return mul(tanh16(div(x, set1(cap))), set1(cap)); }

void soft_cap(float* x, size_t n, float cap) {
  const size_t whole = n / 16 * 16;
  for (size_t i = 0; i < whole; i += 16) store(x + i, capped(load(x + i), cap));
  float rest[16];
  for (size_t i = whole; i < n; ++i) {
    store(rest, capped(set1(x[i]), cap));
    x[i] = rest[0];
  }
}

void rms_norm(const float* x, const float* weight, size_t n, float eps, float* out) {
  const size_t whole = n / 16 * 16;
  V16 squares = zero();
  for (size_t i = 0; i < whole; i += 16) squares = fma(load(x + i), load(x + i), squares);
  float sum = reduce_add(squares);
  for (size_t i = whole; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
  for (size_t i = 0; i < whole; i += 16)
    store(out + i, mul(mul(load(x + i), set1(scale)), load(weight + i)));
  for (size_t i = whole; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, size_t n, float eps,
                float* out) {
  const size_t whole = n / 16 * 16;
  V16 totals = zero(), squares = zero();
  for (size_t i = 0; i < whole; i += 16) totals = add(totals, load(x + i));
  float sum = reduce_add(totals);
  for (size_t i = whole; i < n; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(n);
  for (size_t i = 0; i < whole; i += 16) {
    const V16 centered = sub(load(x + i), set1(mean));
    squares = fma(centered, centered, squares);
  }
  float spread = reduce_add(squares);
  for (size_t i = whole; i < n; ++i) spread += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(spread / static_cast<float>(n) + eps);
  for (size_t i = 0; i < whole; i += 16)
    store(out + i, fma(mul(sub(load(x + i), set1(mean)), set1(scale)), load(weight + i),
                       load(bias + i)));
  for (size_t i = whole; i < n; ++i) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

// One group of one token as codes; the sum of these, and of the upper 16 alone. Paths whose products
// take two tokens at a time have their own.
#ifndef POCKETSLM_PAIRED_CODES
inline int32_t store_group(const QuantizedRow&, int8_t* codes, V16 lo, V16 hi, int32_t& upper) {
  upper = store_i8(codes + 16, hi);
  return store_i8(codes, lo) + upper;
}
#endif

void quantize(const float* x, size_t groups, const QuantizedRow& row) {
  const size_t stride = row.tokens;
  for (size_t g = 0; g < groups; ++g) {
    const V16 lo = load(x + g * kGroup), hi = load(x + g * kGroup + 16);
    const float peak = reduce_magnitude(larger_magnitude(abs(lo), hi));
    const float scale = peak / 127.0f;
    int8_t* codes = row.codes + g * stride * kGroup;
    if (!has_codes(peak)) {
      store_group(row, codes, zero(), zero(), row.upper[g * stride]);
      row.scales[g * stride] = scale;
      row.sums[g * stride] = scale * 0.0f;
      row.corrections[g * stride] = row.upper[g * stride] = 0;
      continue;
    }
    const V16 inverse = set1(127.0f / peak);
    int32_t upper;
    const int32_t sum = store_group(row, codes, mul(lo, inverse), mul(hi, inverse), upper);
    row.scales[g * stride] = scale;
    row.sums[g * stride] = scale * static_cast<float>(sum);
    row.corrections[g * stride] = -8 * sum;
    row.upper[g * stride] = -8 * upper;
  }
}

void to_f16(const float* x, size_t n, uint16_t* out) {
  for (size_t i = 0; i < n; i += 16) store_f16(out + i, load(x + i));
}

// As to_i8, with the sum of the codes.
inline float to_codes(const float* x, size_t n, int8_t* out, int32_t& sum) {
  V16 peaks = zero();
  for (size_t i = 0; i < n; i += 16) peaks = larger_magnitude(peaks, load(x + i));
  const float peak = reduce_magnitude(peaks);
  const bool coded = has_codes(peak);
  const V16 inverse = set1(coded ? 127.0f / peak : 0.0f);
  int32_t total = 0;
  for (size_t i = 0; i < n; i += 16)
    total += store_i8(out + i, coded ? mul(load(x + i), inverse) : zero());
  sum = total;
  return peak / 127.0f;
}

float to_i8(const float* x, size_t n, int8_t* out) {
  int32_t sum;
  return to_codes(x, n, out, sum);
}

template <typename T>
void lower_rank(const T* a, const float* x, size_t cols, size_t panels, float* out) {
  for (size_t p = 0; p < panels; ++p, a += cols * 16) {
    V16 sums[4] = {zero(), zero(), zero(), zero()};  // four, since each one waits for itself
    size_t c = 0;
    for (; c + 4 <= cols; c += 4)
      for (size_t i = 0; i < 4; ++i)
        sums[i] = fma(set1(x[c + i]), load_factor(a + (c + i) * 16), sums[i]);
    for (; c < cols; ++c) sums[c % 4] = fma(set1(x[c]), load_factor(a + c * 16), sums[c % 4]);
    store(out + p * 16, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
}

template <typename T>
void add_low_rank(const T* b, const float* low, size_t rank, size_t blocks, float* out) {
  for (size_t k = 0; k < blocks; ++k, b += rank * 16) {
    V16 even = load(out + k * 16), odd = zero();
    size_t r = 0;
    for (; r + 2 <= rank; r += 2) {
      even = fma(set1(low[r]), load_factor(b + r * 16), even);
      odd = fma(set1(low[r + 1]), load_factor(b + (r + 1) * 16), odd);
    }
    if (r < rank) even = fma(set1(low[r]), load_factor(b + r * 16), even);
    store(out + k * 16, add(even, odd));
  }
}

void weigh_scales(const uint16_t* scales, const float* weights, size_t groups, float* out) {
  V16 sum = zero();
  for (size_t g = 0; g < groups; ++g) {
    const V16 scale = load_kv(scales + g * 16);
    sum = fma(mul(scale, scale), set1(weights[g]), sum);
  }
  store(out, sum);
}

void highest(const float* x, size_t blocks, float* out) {
  V16 magnitudes = zero();
  for (size_t b = 0; b < blocks; ++b) {
    const V16 block = load(x + b * 16);
    magnitudes = larger_magnitude(magnitudes, block);
    out[b] = reduce_max(block);
  }
  const auto finite = [](V16 a) { return reduce_magnitude(a) <= 3.4028234e38f; };
  if (finite(magnitudes)) return;
  for (size_t b = 0; b < blocks; ++b)
    if (!finite(abs(load(x + b * 16)))) out[b] = __builtin_nanf("");
}

float sum_exp(const float* x, size_t n, float shift) {
  const size_t whole = n / 16 * 16;
  V16 total = zero();
  for (size_t i = 0; i < whole; i += 16) total = add(total, exp16(sub(load(x + i), set1(shift))));
  float rest[16], sum = reduce_add(total);
  for (size_t i = whole; i < n; ++i) {
    store(rest, exp16(set1(x[i] - shift)));
    sum += rest[0];
  }
  return sum;
}

// Where the other half of a 64-byte line lies that a product reads: in its next step, or in the next
// panel. `none`: lines are not asked for ahead.
enum class OtherHalf { none, step, panel };

template <OtherHalf H, size_t step, size_t panel>
inline __attribute__((always_inline)) void ask_ahead(const uint16_t* line,
                                                     std::ptrdiff_t ahead) {
  if constexpr ((H == OtherHalf::step && step % 2 == 0) ||
                (H == OtherHalf::panel && panel % 2 == 0))
    __builtin_prefetch(reinterpret_cast<const char*>(line) + ahead, 0, 2);
}
template <OtherHalf H, size_t, size_t>
inline void ask_ahead(const float*, std::ptrdiff_t) {
  static_assert(H == OtherHalf::none);
}

// One step of rows_times_panels.
template <OtherHalf H, size_t step, size_t R, size_t W, typename T>
inline __attribute__((always_inline)) void add_step(const float* a, size_t a_stride, const T* b,
                                                    size_t panel_stride, std::ptrdiff_t ahead,
                                                    V16 (&acc)[R][W]) {
  V16 columns[W];
  unrolled<W>([&](auto w) __attribute__((always_inline)) {
    const T* line = b + w * panel_stride;
    ask_ahead<H, step, w>(line, ahead);
    columns[w] = load_kv(line);
  });
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    const V16 factor = set1(a[r * a_stride]);
    unrolled<W>([&](auto w) __attribute__((always_inline)) {
      acc[r][w] = fma(factor, columns[w], acc[r][w]);
    });
  });
}

#ifdef POCKETSLM_FACTORS_BY_LANE
// Four steps, whose factors of a row are the lanes of one register.
template <OtherHalf H, size_t R, size_t W, typename T>
inline __attribute__((always_inline)) void add_four_steps(const float* a, size_t a_stride,
                                                          const T* b, size_t b_stride,
                                                          size_t panel_stride, std::ptrdiff_t ahead,
                                                          V16 (&acc)[R][W]) {
  Lanes factors[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { factors[r] = Lanes(a + r * a_stride); });
  unrolled<4>([&](auto step) __attribute__((always_inline)) {
    unrolled<W>([&](auto w) __attribute__((always_inline)) {
      const T* line = b + w * panel_stride + step * b_stride;
      ask_ahead<H, step, w>(line, ahead);
      const V16 column = load_kv(line);
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        factors[r].template add<step>(column, acc[r][w]);
      });
    });
  });
}
#endif

// acc[r][w] (+)= sum over i of a[r][i] * b[w][i][0..15]: both products of attention are this shape,
// with b the keys (16 positions wide) or the values (16 of head_dim wide). R * W accumulators must
// both fit the registers and be enough to hide the latency of an FMA.
// Memory at the distance of `ahead` bytes is asked for as H says.
template <OtherHalf H, size_t R, size_t W, typename T>
inline __attribute__((always_inline)) void rows_times_panels(const float* a, size_t a_stride, const T* b, size_t b_stride,
                              size_t panel_stride, size_t length, std::ptrdiff_t ahead,
                              V16 (&acc)[R][W]) {
  size_t i = 0;
#ifdef POCKETSLM_FACTORS_BY_LANE
  if constexpr (R <= kMaxLaneRows)
    for (; i + 4 <= length; i += 4)
      add_four_steps<H>(a + i, a_stride, b + i * b_stride, b_stride, panel_stride, ahead, acc);
#endif
  for (; i + 2 <= length; i += 2) {
    add_step<H, 0>(a + i, a_stride, b + i * b_stride, panel_stride, ahead, acc);
    add_step<H, 1>(a + i + 1, a_stride, b + (i + 1) * b_stride, panel_stride, ahead, acc);
  }
  if (i < length) add_step<H, 0>(a + i, a_stride, b + i * b_stride, panel_stride, ahead, acc);
}

// Calls f(r, w) for all accumulators of R rows by W panels. Indices are constants, since compilers
// keep arrays in registers only where all of them are.
template <size_t R, size_t W, typename F>
inline __attribute__((always_inline)) void for_each(F&& f) {
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    unrolled<W>([&](auto w) __attribute__((always_inline)) { f(r, w); });
  });
}

// Calls `f<R>(row)` for row groups of 12, 6, 3 and 1, at most `most`.
#define POCKETSLM_FOR_ROW_GROUPS(most, rows, call)     \
  for (size_t row = 0; row < (rows);) {                \
    const size_t left = (rows)-row;                    \
    if (most >= 12 && left >= 12) {                    \
      constexpr size_t R = most >= 12 ? 12 : 1;        \
      call;                                            \
      row += R;                                        \
    } else if (most >= 6 && left >= 6) {               \
      constexpr size_t R = most >= 6 ? 6 : 1;          \
      call;                                            \
      row += R;                                        \
    } else if (left >= 3) {                            \
      constexpr size_t R = 3;                          \
      call;                                            \
      row += R;                                        \
    } else {                                           \
      constexpr size_t R = 1;                          \
      call;                                            \
      row += R;                                        \
    }                                                  \
  }

#include "kernels_attention.inl"

// Matrices kept as floats. OUTPUT rows are lanes; columns are added in order.
template <typename T, size_t R>
void matmul_float_rows(const T* block, size_t cols, const ActivationTile& tile, size_t row,
                       float* out, size_t out_stride) {
  V16 acc[R][1];
  for_each<R, 1>([&](auto r, auto w) __attribute__((always_inline)) { acc[r][w] = zero(); });
  rows_times_panels<OtherHalf::none>(tile.values + row * tile.stride, tile.stride, block, kBlockRows,
                                     0, cols, 0, acc);
  for_each<R, 1>([&](auto r, auto w) __attribute__((always_inline)) {
    store(out + (row + r) * out_stride, acc[r][w]);
  });
}

template <typename T>
void matmul_float(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
                  float* out, size_t out_stride) {
  for (size_t b = 0; b < count; ++b) {
    const T* block = reinterpret_cast<const T*>(blocks.from(b).data);
    if (tile.ahead) use_lines(*tile.ahead, cols * kBlockRows * sizeof(T) / 64);
    POCKETSLM_FOR_ROW_GROUPS(
        kMaxRegisterRows, tile.tokens, (matmul_float_rows<T, R>(block, cols, tile, row, out + b * 16, out_stride)))
  }
}
#undef POCKETSLM_FOR_ROW_GROUPS
