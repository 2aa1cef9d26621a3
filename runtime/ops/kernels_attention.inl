// Attention of query rows over cached keys and values, in fp16 and in int8. Included by
// kernels_vector.inl.

// How many panels R rows take at a time.
template <size_t R>
constexpr size_t kPanels = kAccumulators / R > 4 ? 4 : kAccumulators / R > 1 ? kAccumulators / R : 1;

// Keys and values are asked for while those before them are used: the values of a span while its scores
// are computed, then the keys that come next. Both have the same size. Bytes from what is used to what
// is asked for:
inline std::ptrdiff_t distance(const void* from, const void* to) {
  return reinterpret_cast<std::intptr_t>(to) - reinterpret_cast<std::intptr_t>(from);
}
inline std::ptrdiff_t from_keys(const AttentionJob& job) { return distance(job.keys, job.values); }
// `width`: bytes of an element; behind the last span come the keys of the next job.
inline std::ptrdiff_t from_values(const AttentionJob& job, size_t width, size_t first, size_t next) {
  const auto at = [&](const void* part, size_t position) {
    return static_cast<const char*>(part) + position * job.head_dim * width;
  };
  const void* values = at(job.values, first);
  return distance(values, next < job.end ? at(job.keys, next) : job.next ? job.next : values);
}

template <size_t R, size_t W>
inline void key_scores(const AttentionJob& job, size_t row, size_t position, float* scores) {
  V16 acc[R][W];
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) { acc[r][w] = zero(); });
  rows_times_panels<OtherHalf::step>(
      job.queries + row * job.head_dim, job.head_dim,
      static_cast<const uint16_t*>(job.keys) + position * job.head_dim, kPositionBlock,
      kPositionBlock * job.head_dim, job.head_dim, from_keys(job), acc);
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
                       const float* weights, const float* decay, std::ptrdiff_t ahead, size_t d) {
  V16 acc[R][W];
  float* out = job.out + row * job.head_dim + d;
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    acc[r][w] = mul(load(out + r * job.head_dim + w * 16), set1(decay[r]));
  });
  rows_times_panels<OtherHalf::panel>(
      weights, kScoreSpan, static_cast<const uint16_t*>(job.values) + first * job.head_dim + d,
      job.head_dim, 16, count, ahead, acc);
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    store(out + r * job.head_dim + w * 16, acc[r][w]);
  });
}

template <size_t R>
void add_all_values(const AttentionJob& job, size_t row, size_t first, size_t count,
                    const float (*weights)[kScoreSpan], const float* decay,
                    std::ptrdiff_t ahead) {
  constexpr size_t W = kPanels<R>;
  size_t d = 0;
  for (; d + W * 16 <= job.head_dim; d += W * 16)
    add_values<R, W>(job, row, first, count, weights[row], decay + row, ahead, d);
  for (; d < job.head_dim; d += 16)
    add_values<R, 1>(job, row, first, count, weights[row], decay + row, ahead, d);
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
    const std::ptrdiff_t ahead = from_values(job, sizeof(uint16_t), first, first + live);
    // Positions past `live` were never written: their weight is 0, but 0 * NaN is not.
    POCKETSLM_FOR_ROW_GROUPS(kMaxRegisterRows, job.rows,
                             (add_all_values<R>(job, row, first, live, scores, decay, ahead)))
  });
}

// Attention over int8 keys and values takes dot products of int8: of the keys with queries that are
// rounded to int8 as well, and of the values with weights of 14 bits, in two digits.

// acc[r][w] += sum over i of a[r][4 i ..] times line i of panel w, which has four codes of each of 16
// positions, or channels. L is how a path wants the lines for factors of this kind.
template <typename L, size_t R, size_t W>
inline __attribute__((always_inline)) void dot_panels(const int8_t* a, size_t a_stride, const int8_t* b, size_t b_step,
                       size_t panel_stride, size_t count, std::ptrdiff_t ahead,
                       I16 (&acc)[R][W]) {
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
                         kPositionBlock * dim, dim / 4, from_keys(job), acc);
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
                           size_t first, size_t quads, const float* decay, std::ptrdiff_t ahead,
                           size_t d) {
  I16 acc[2 * R][W];
  for_each<2 * R, W>([&](auto r, auto w) __attribute__((always_inline)) { acc[r][w] = set1_i32(0); });
  const size_t dim = job.head_dim;
  dot_panels<UnsignedLine>(weights.digits[row][0], kScoreSpan,
                           static_cast<const int8_t*>(job.values) + first * dim + 4 * d, 4 * dim,
                           64, quads, ahead, acc);
  for_each<R, W>([&](auto r, auto w) __attribute__((always_inline)) {
    float* out = job.out + (row + r) * dim + d + w * 16;
    const V16 sum = to_float(join_digits(acc[2 * r][w], acc[2 * r + 1][w]));
    store(out, fma(sum, set1(weights.units[row + r]), mul(load(out), set1(decay[row + r]))));
  });
}

template <size_t R>
void add_all_value_dots(const AttentionJob& job, const WeightDigits& weights, size_t row,
                        size_t first, size_t quads, const float* decay, std::ptrdiff_t ahead) {
  constexpr size_t W = kDotPanels<R>;
  size_t d = 0;
  for (; d + W * 16 <= job.head_dim; d += W * 16)
    add_value_dots<R, W>(job, weights, row, first, quads, decay, ahead, d);
  for (; d < job.head_dim; d += 16)
    add_value_dots<R, 1>(job, weights, row, first, quads, decay, ahead, d);
}

void attend_i8(const AttentionJob& job) {
  alignas(64) float scores[kMaxQueryRows][kScoreSpan];
  float decay[kMaxQueryRows];
  QueryCodes queries;
  WeightDigits weights;
  const size_t dim = job.head_dim;
  for (size_t r = 0; r < job.rows; ++r)
    queries.scales[r] =
        to_codes(job.queries + r * dim, dim, queries.codes + r * dim, queries.sums[r]);
  begin_rows(job);
  for_spans(job, [&](size_t first, size_t live, size_t count) {
    POCKETSLM_FOR_ROW_GROUPS(kDotRows, job.rows,
                             (all_key_dots<R>(job, queries, row, first, count, scores)))
    for (size_t r = 0; r < job.rows; ++r) {
      decay[r] = weigh(job, r, first, count, scores[r]);
      weights.set(r, scores[r], job.value_scales + first, live, count);
    }
    const std::ptrdiff_t ahead = from_values(job, sizeof(int8_t), first, first + live);
    POCKETSLM_FOR_ROW_GROUPS(
        kDotRows, job.rows,
        (add_all_value_dots<R>(job, weights, row, first, (live + 3) / 4, decay, ahead)))
  });
}
