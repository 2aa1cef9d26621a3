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

float to_i8(const float* x, size_t n, int8_t* out) {
  V16 peaks = zero();
  for (size_t i = 0; i < n; i += 16) peaks = larger_magnitude(peaks, load(x + i));
  const float peak = reduce_magnitude(peaks);
  if (!has_codes(peak)) {
    for (size_t i = 0; i < n; i += 16) store_i8(out + i, zero());
    return peak / 127.0f;
  }
  const V16 inverse = set1(127.0f / peak);
  for (size_t i = 0; i < n; i += 16) store_i8(out + i, mul(load(x + i), inverse));
  return peak / 127.0f;
}

void lower_rank(const uint16_t* a, const float* x, size_t cols, size_t panels, float* out) {
  for (size_t p = 0; p < panels; ++p, a += cols * 16) {
    V16 sums[4] = {zero(), zero(), zero(), zero()};  // four, since each one waits for itself
    size_t c = 0;
    for (; c + 4 <= cols; c += 4)
      for (size_t i = 0; i < 4; ++i)
        sums[i] = fma(set1(x[c + i]), load_kv(a + (c + i) * 16), sums[i]);
    for (; c < cols; ++c) sums[c % 4] = fma(set1(x[c]), load_kv(a + c * 16), sums[c % 4]);
    store(out + p * 16, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
}

void add_low_rank(const uint16_t* b, const float* low, size_t rank, size_t blocks, float* out) {
  for (size_t k = 0; k < blocks; ++k, b += rank * 16) {
    V16 even = load(out + k * 16), odd = zero();
    size_t r = 0;
    for (; r + 2 <= rank; r += 2) {
      even = fma(set1(low[r]), load_kv(b + r * 16), even);
      odd = fma(set1(low[r + 1]), load_kv(b + (r + 1) * 16), odd);
    }
    if (r < rank) even = fma(set1(low[r]), load_kv(b + r * 16), even);
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

// acc[r][w] (+)= sum over i of a[r][i] * b[w][i][0..15]: both products of attention are this shape,
// with b the keys (16 positions wide) or the values (16 of head_dim wide). R * W accumulators must
// both fit the registers and be enough to hide the latency of an FMA.
// With `ahead`, the panels' memory at that distance is asked for too.
template <size_t R, size_t W, typename T>
inline __attribute__((always_inline)) void rows_times_panels(const float* a, size_t a_stride, const T* b, size_t b_stride,
                              size_t panel_stride, size_t length, size_t ahead,
                              V16 (&acc)[R][W]) {
  for (size_t i = 0; i < length; ++i) {
    V16 columns[W];
    unrolled<W>([&](auto w) __attribute__((always_inline)) {
      const T* line = b + w * panel_stride + i * b_stride;
      if (ahead) __builtin_prefetch(line + ahead, 0, 2);
      columns[w] = load_kv(line);
    });
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      const V16 factor = set1(a[r * a_stride + i]);
      unrolled<W>([&](auto w) __attribute__((always_inline)) {
        acc[r][w] = fma(factor, columns[w], acc[r][w]);
      });
    });
  }
}

// Calls f(r, w) for all accumulators of R rows by W panels. Indices are constants, since compilers
// keep arrays in registers only where all of them are.
template <size_t R, size_t W, typename F>
inline __attribute__((always_inline)) void for_each(F&& f) {
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    unrolled<W>([&](auto w) __attribute__((always_inline)) { f(r, w); });
  });
}

// How many panels R rows take at a time.
template <size_t R>
constexpr size_t kPanels = kAccumulators / R > 4 ? 4 : kAccumulators / R > 1 ? kAccumulators / R : 1;

// Positions ahead of their use that keys and values are asked for.
constexpr size_t kPositionsAhead = 128;

template <size_t R, size_t W>
inline void key_scores(const AttentionJob& job, size_t row, size_t position, float* scores) {
  V16 acc[R][W];
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) { acc[r][w] = zero(); });
  rows_times_panels<R, W>(job.queries + row * job.head_dim, job.head_dim,
                          static_cast<const uint16_t*>(job.keys) + position * job.head_dim,
                          kPositionBlock, kPositionBlock * job.head_dim, job.head_dim,
                          kPositionsAhead * job.head_dim, acc);
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    store(scores + r * kScoreSpan + w * kPositionBlock, acc[r][w]);
  });
}

template <size_t R>
void all_key_scores(const AttentionJob& job, size_t row, size_t first, size_t count,
                    float (*scores)[kScoreSpan]) {
  constexpr size_t W = kPanels<R>;
  size_t p = 0;
  for (; p + W * kPositionBlock <= count; p += W * kPositionBlock)
    key_scores<R, W>(job, row, first + p, scores[row] + p);
  for (; p < count; p += kPositionBlock)
    key_scores<R, 1>(job, row, first + p, scores[row] + p);
}

template <size_t R, size_t W>
inline void add_values(const AttentionJob& job, size_t row, size_t first, size_t count,
                       const float* weights, const float* decay, size_t d) {
  V16 acc[R][W];
  float* out = job.out + row * job.head_dim + d;
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    acc[r][w] = mul(load(out + r * job.head_dim + w * 16), set1(decay[r]));
  });
  rows_times_panels<R, W>(weights, kScoreSpan,
                          static_cast<const uint16_t*>(job.values) + first * job.head_dim + d,
                          job.head_dim, 16, count, kPositionsAhead * job.head_dim, acc);
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    store(out + r * job.head_dim + w * 16, acc[r][w]);
  });
}

template <size_t R>
void add_all_values(const AttentionJob& job, size_t row, size_t first, size_t count,
                    const float (*weights)[kScoreSpan], const float* decay) {
  constexpr size_t W = kPanels<R>;
  size_t d = 0;
  for (; d + W * 16 <= job.head_dim; d += W * 16)
    add_values<R, W>(job, row, first, count, weights[row], decay + row, d);
  for (; d < job.head_dim; d += 16)
    add_values<R, 1>(job, row, first, count, weights[row], decay + row, d);
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

// A row's scores of `count` positions from `first` on to weights, and into its state; returns how the
// result so far decays.
inline float weigh(const AttentionJob& job, size_t r, size_t first, size_t count, float* s) {
  const auto place = [&](size_t position) {
    return position <= first ? 0 : position - first < count ? position - first : count;
  };
  const size_t unseen = job.starts ? place(job.starts[r]) : 0, visible = place(job.limits[r]);
  const auto hide = [&](float value) {
    for (size_t p = 0; p < unseen; ++p) s[p] = value;
    for (size_t p = visible; p < count; ++p) s[p] = value;
  };
  if (unseen >= visible) {
    for (size_t p = 0; p < count; ++p) s[p] = 0;
    return 1;
  }
  if (job.cap > 0) soft_cap(s, count, job.cap);
  hide(-3.0e38f);
  V16 peaks = load(s);
  for (size_t p = 16; p < count; p += 16) peaks = max(peaks, load(s + p));
  const float peak = reduce_max(peaks);
  const float maximum = peak > job.maximum[r] ? peak : job.maximum[r];
  alignas(64) float decay[16];
  store(decay, exp2_16(set1(job.maximum[r] - maximum)));
  V16 total = zero();  // what is hidden adds too little to change it
  for (size_t p = 0; p < count; p += 16) {
    const V16 weight = exp2_16(sub(load(s + p), set1(maximum)));
    total = add(total, weight);
    store(s + p, weight);
  }
  hide(0);
  job.weight[r] = job.weight[r] * decay[0] + reduce_add(total);
  job.maximum[r] = maximum;
  return decay[0];
}

inline void begin_rows(const AttentionJob& job) {
  for (size_t r = 0; r < job.rows; ++r) {
    job.maximum[r] = -3.0e38f;
    job.weight[r] = 0;
    for (size_t d = 0; d < job.head_dim; d += 16) store(job.out + r * job.head_dim + d, zero());
  }
}

// Calls f(first position, positions, the same rounded up) for the spans of a job.
template <typename F>
inline void for_spans(const AttentionJob& job, F&& f) {
  for (size_t first = job.begin, next; first < job.end; first = next) {
    next = job.span_end(first);
    f(first, next - first, round_up(next - first, kPositionBlock));
  }
}

void attend_f16(const AttentionJob& job) {
  alignas(64) float scores[kMaxQueryRows][kScoreSpan];
  float decay[kMaxQueryRows];
  begin_rows(job);
  for_spans(job, [&](size_t first, size_t live, size_t count) {
    POCKETSLM_FOR_ROW_GROUPS(kMaxRegisterRows, job.rows,
                             (all_key_scores<R>(job, row, first, count, scores)))
    for (size_t r = 0; r < job.rows; ++r) decay[r] = weigh(job, r, first, count, scores[r]);
    // Positions past `live` were never written: their weight is 0, but 0 * NaN is not.
    POCKETSLM_FOR_ROW_GROUPS(kMaxRegisterRows, job.rows,
                             (add_all_values<R>(job, row, first, live, scores, decay)))
  });
}

// Attention over int8 keys and values takes dot products of int8: of the keys with queries that are
// rounded to int8 as well, and of the values with weights of 14 bits, in two digits.

// acc[r][w] += sum over i of a[r][4 i ..] times line i of panel w, which has four codes of each of 16
// positions, or channels. L is how a path wants the lines for factors of this kind.
template <typename L, size_t R, size_t W>
inline __attribute__((always_inline)) void dot_panels(const int8_t* a, size_t a_stride, const int8_t* b, size_t b_step,
                       size_t panel_stride, size_t count, size_t ahead, I16 (&acc)[R][W]) {
  for (size_t i = 0; i < count; ++i) {
    L lines[W];
    unrolled<W>([&](auto w) __attribute__((always_inline)) {
      const int8_t* line = b + w * panel_stride + i * b_step;
      __builtin_prefetch(line + ahead, 0, 2);
      lines[w] = L(line);
    });
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      const Quad quad = load_quad(a + r * a_stride + 4 * i);
      unrolled<W>([&](auto w) __attribute__((always_inline)) {
        lines[w].dot(acc[r][w], quad);
      });
    });
  }
}

template <size_t R>
constexpr size_t kDotPanels = kDotAccumulators / (2 * R) > kMaxDotPanels
                                  ? kMaxDotPanels
                                  : kDotAccumulators / (2 * R);

// The rows of a job as int8.
struct QueryCodes {
  alignas(64) int8_t codes[kMaxQueryRows * kMaxHeadDim];
  float scales[kMaxQueryRows];
  int32_t sums[kMaxQueryRows];
};

template <size_t R, size_t W>
inline void key_dots(const AttentionJob& job, const QueryCodes& queries, size_t row,
                     size_t position, float* scores) {
  I16 acc[R][W];
  const size_t dim = job.head_dim;
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    acc[r][w] = set1_i32(-SignedLine::kBias * queries.sums[row + r]);
  });
  dot_panels<SignedLine>(queries.codes + row * dim, dim,
                         static_cast<const int8_t*>(job.keys) + position * dim, 64,
                         kPositionBlock * dim, dim / 4, kPositionsAhead * dim, acc);
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    const V16 scale = mul(load(job.key_scales + position + w * kPositionBlock),
                          set1(queries.scales[row + r]));
    store(scores + r * kScoreSpan + w * kPositionBlock, mul(to_float(acc[r][w]), scale));
  });
}

template <size_t R>
void all_key_dots(const AttentionJob& job, const QueryCodes& queries, size_t row, size_t first,
                  size_t count, float (*scores)[kScoreSpan]) {
  constexpr size_t W = kDotPanels<R>;
  size_t p = 0;
  for (; p + W * kPositionBlock <= count; p += W * kPositionBlock)
    key_dots<R, W>(job, queries, row, first + p, scores[row] + p);
  for (; p < count; p += kPositionBlock)
    key_dots<R, 1>(job, queries, row, first + p, scores[row] + p);
}

// The weights of a span as whole numbers of `unit`, in a high and a low digit.
struct WeightDigits {
  alignas(64) int8_t digits[kMaxQueryRows][2][kScoreSpan];
  float units[kMaxQueryRows];

  void set(size_t r, float* weights, const float* scales, size_t live, size_t count) {
    V16 peaks = zero(), total = zero();
    for (size_t p = 0; p < count; p += 16) {
      V16 weight = mul(load(weights + p), load(scales + p));
      store(weights + p, weight);
      if (p + 16 > live) {  // scales past `live` were never written
        for (size_t i = live; i < p + 16; ++i) weights[i] = 0;
        weight = load(weights + p);
      }
      peaks = max(peaks, weight), total = add(total, weight);
    }
    const float peak = reduce_max(peaks);
    const V16 factor = set1(has_codes(peak) ? kMostWeight / peak : 0.0f);
    // Not finite where one of them is not, whatever the digits are then.
    units[r] = peak / kMostWeight + 0.0f * reduce_add(total);
    for (size_t p = 0; p < count; p += 16)
      store_digits(digits[r][0] + p, digits[r][1] + p, mul(load(weights + p), factor));
  }
};

template <size_t R, size_t W>
inline void add_value_dots(const AttentionJob& job, const WeightDigits& weights, size_t row,
                           size_t first, size_t quads, const float* decay, size_t d) {
  I16 acc[2 * R][W];
  for_each<2 * R, W>([&](auto r, auto w) __attribute__((always_inline)) { acc[r][w] = set1_i32(0); });
  const size_t dim = job.head_dim;
  dot_panels<UnsignedLine>(weights.digits[row][0], kScoreSpan,
                           static_cast<const int8_t*>(job.values) + first * dim + 4 * d, 4 * dim,
                           64, quads, kPositionsAhead * dim, acc);
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    float* out = job.out + (row + r) * dim + d + w * 16;
    const V16 sum = to_float(join_digits(acc[2 * r][w], acc[2 * r + 1][w]));
    store(out, fma(sum, set1(weights.units[row + r]), mul(load(out), set1(decay[row + r]))));
  });
}

template <size_t R>
void add_all_value_dots(const AttentionJob& job, const WeightDigits& weights, size_t row,
                        size_t first, size_t quads, const float* decay) {
  constexpr size_t W = kDotPanels<R>;
  size_t d = 0;
  for (; d + W * 16 <= job.head_dim; d += W * 16)
    add_value_dots<R, W>(job, weights, row, first, quads, decay, d);
  for (; d < job.head_dim; d += 16)
    add_value_dots<R, 1>(job, weights, row, first, quads, decay, d);
}

void attend_i8(const AttentionJob& job) {
  alignas(64) float scores[kMaxQueryRows][kScoreSpan];
  float decay[kMaxQueryRows];
  QueryCodes queries;
  WeightDigits weights;
  const size_t dim = job.head_dim;
  for (size_t r = 0; r < job.rows; ++r) {
    int8_t* codes = queries.codes + r * dim;
    queries.scales[r] = to_i8(job.queries + r * dim, dim, codes);
    queries.sums[r] = 0;
    for (size_t d = 0; d < dim; ++d) queries.sums[r] += codes[d];
  }
  begin_rows(job);
  for_spans(job, [&](size_t first, size_t live, size_t count) {
    POCKETSLM_FOR_ROW_GROUPS(kDotRows, job.rows,
                             (all_key_dots<R>(job, queries, row, first, count, scores)))
    for (size_t r = 0; r < job.rows; ++r) {
      decay[r] = weigh(job, r, first, count, scores[r]);
      weights.set(r, scores[r], job.value_scales + first, live, count);
    }
    POCKETSLM_FOR_ROW_GROUPS(
        kDotRows, job.rows,
        (add_all_value_dots<R>(job, weights, row, first, (live + 3) / 4, decay)))
  });
}

// Matrices kept as floats. OUTPUT rows are lanes; columns are added in order.
template <typename T, size_t R>
void matmul_float_rows(const T* block, size_t cols, const ActivationTile& tile, size_t row,
                       float* out, size_t out_stride) {
  V16 acc[R][1];
  for_each<R, 1>([&](auto r, auto w) __attribute__((always_inline)) { acc[r][w] = zero(); });
  rows_times_panels<R, 1>(tile.values + row * tile.stride, tile.stride, block, kBlockRows, 0, cols,
                          0, acc);
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
