// The reference: plain loops that say what every other path must compute.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "weight_values.h"

namespace pocketslm {
namespace {

float load_element(const float* p) { return *p; }
float load_element(const uint16_t* p) { return half_to_float(*p); }

template <typename T>
void matmul_float(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
                  float* out, size_t out_stride) {
  for (size_t b = 0; b < count; ++b) {
    const T* w = reinterpret_cast<const T*>(blocks.from(b).data);
    for (size_t t = 0; t < tile.tokens; ++t)
      for (size_t r = 0; r < kBlockRows; ++r) {
        float sum = 0;
        for (size_t k = 0; k < cols; ++k)
          sum += load_element(w + k * kBlockRows + r) * tile.values[t * tile.stride + k];
        out[t * out_stride + b * kBlockRows + r] = sum;
      }
  }
}

template <WeightKind K>
void matmul(const Blocks& blocks, size_t count, size_t cols, const ActivationTile& tile,
            float* out, size_t out_stride) {
  constexpr Form form = form_of(K);
  constexpr size_t width = form.scale_columns;
  const BlockLayout layout = block_layout(K, cols);
  for (size_t b = 0; b < count; ++b) {
    const BlockParts block = parts_of(blocks.from(b), layout);
    for (size_t t = 0; t < tile.tokens; ++t)
      for (size_t r = 0; r < kBlockRows; ++r) {
        float sum = 0;
        for (size_t column = 0; column < cols; column += width) {
          const size_t at = column / kGroup * tile.tokens + t;
          const int8_t* x = tile.codes + at * kGroup + column % kGroup;
          int dot = 0;
          for (size_t k = 0; k < width; ++k) dot += value_at(form, block, r, column + k) * x[k];
          const auto [scale, minimum] = scale_at(form, block, r, column);
          sum += static_cast<float>(dot) * (scale * tile.scales[at]);
          if (form.offset == Offset::minimum)
            sum += minimum * part_sum<K>(tile, at, static_cast<int>(column % kGroup / 16));
        }
        out[t * out_stride + b * kBlockRows + r] = sum;
      }
  }
}

void rms_norm(const float* x, const float* weight, size_t n, float eps, float* out) {
  float sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
  for (size_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

float to_i8(const float* x, size_t n, int8_t* out) {
  float peak = 0;
  for (size_t i = 0; i < n; ++i)
    if (!std::isnan(peak) && !(std::fabs(x[i]) <= peak)) peak = std::fabs(x[i]);
  const float inverse = has_codes(peak) ? 127.0f / peak : 0.0f;
  for (size_t i = 0; i < n; ++i)
    out[i] = inverse ? static_cast<int8_t>(std::lrint(x[i] * inverse)) : int8_t{0};
  return peak / 127.0f;
}

void quantize(const float* x, size_t groups, const QuantizedRow& row) {
  for (size_t g = 0; g < groups; ++g) {
    int8_t* codes = row.codes + g * row.tokens * kGroup;
    const float scale = to_i8(x + g * kGroup, kGroup, codes);
    int sum = 0, upper = 0;
    for (size_t k = 0; k < kGroup; ++k) sum += codes[k], upper += k < kGroup / 2 ? 0 : codes[k];
    row.scales[g * row.tokens] = scale;
    row.sums[g * row.tokens] = scale * static_cast<float>(sum);
    row.corrections[g * row.tokens] = -8 * sum;
    row.upper[g * row.tokens] = -8 * upper;
  }
}

void layer_norm(const float* x, const float* weight, const float* bias, size_t n, float eps,
                float* out) {
  float sum = 0, squares = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(n);
  for (size_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (size_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

template <Activation A>
float activated(float x) {
  switch (A) {
    case Activation::silu: return x / (1.0f + std::exp(-x));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    case Activation::gelu: return 0.5f * x * (1.0f + std::erf(x * 0.7071067812f));
    case Activation::relu: return x < 0 ? 0.0f : x;
    case Activation::relu2: return x < 0 ? 0.0f : x * x;
  }
}

template <Activation A>
void gated(const float* gate, const float* up, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = activated<A>(gate[i]) * up[i];
}

template <Activation A>
void activate(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = activated<A>(x[i]);
}

void soft_cap(float* x, size_t n, float cap) {
  for (size_t i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

void to_f16(const float* x, size_t n, uint16_t* out) {
  for (size_t i = 0; i < n; ++i) out[i] = float_to_half(x[i]);
}

float factor(uint16_t x) { return half_to_float(x); }
float factor(int8_t x) { return x; }

template <typename T>
void lower_rank(const T* a, const float* x, size_t cols, size_t panels, float* out) {
  for (size_t p = 0; p < panels; ++p)
    for (size_t r = 0; r < kBlockRows; ++r) {
      float sum = 0;
      for (size_t c = 0; c < cols; ++c)
        sum += x[c] * factor(a[(p * cols + c) * kBlockRows + r]);
      out[p * kBlockRows + r] = sum;
    }
}

template <typename T>
void add_low_rank(const T* b, const float* low, size_t rank, size_t blocks, float* out) {
  for (size_t k = 0; k < blocks; ++k)
    for (size_t r = 0; r < rank; ++r)
      for (size_t j = 0; j < kBlockRows; ++j)
        out[k * kBlockRows + j] += low[r] * factor(b[(k * rank + r) * kBlockRows + j]);
}

void highest(const float* x, size_t blocks, float* out) {
  for (size_t b = 0; b < blocks; ++b, x += kBlockRows) {
    out[b] = *std::max_element(x, x + kBlockRows);
    for (size_t r = 0; r < kBlockRows; ++r)
      if (!std::isfinite(x[r])) out[b] = std::numeric_limits<float>::quiet_NaN();
  }
}

void weigh_scales(const uint16_t* scales, const float* weights, size_t groups, float* out) {
  for (size_t r = 0; r < kBlockRows; ++r) {
    out[r] = 0;
    for (size_t g = 0; g < groups; ++g) {
      const float scale = half_to_float(scales[g * kBlockRows + r]);
      out[r] += scale * scale * weights[g];
    }
  }
}

float sum_exp(const float* x, size_t n, float shift) {
  float sum = 0;
  for (size_t i = 0; i < n; ++i) sum += std::exp(x[i] - shift);
  return sum;
}

void begin_row(const AttentionJob& job, size_t r) {
  job.maximum[r] = -3.0e38f, job.weight[r] = 0;
  std::fill_n(job.out + r * job.head_dim, job.head_dim, 0.0f);
}

bool is_seen(const AttentionJob& job, size_t r, size_t position) {
  return position < job.limits[r] && (!job.starts || position >= job.starts[r]);
}

void attend_f16(const AttentionJob& job) {
  const size_t dim = job.head_dim;
  const uint16_t* keys = static_cast<const uint16_t*>(job.keys);
  const uint16_t* values = static_cast<const uint16_t*>(job.values);
  for (size_t r = 0; r < job.rows; ++r) {
    begin_row(job, r);
    const float* query = job.queries + r * dim;
    float* out = job.out + r * dim;
    for (size_t p = job.begin; p < job.end; ++p) {
      if (!is_seen(job, r, p)) continue;
      const uint16_t* key = keys + p / kPositionBlock * kPositionBlock * dim + p % kPositionBlock;
      float score = 0;
      for (size_t d = 0; d < dim; ++d) score += query[d] * load_element(key + d * kPositionBlock);
      if (job.cap > 0) score = job.cap * std::tanh(score / job.cap);
      const float maximum = std::fmax(job.maximum[r], score);
      const float decay = std::exp2(job.maximum[r] - maximum), share = std::exp2(score - maximum);
      job.weight[r] = job.weight[r] * decay + share;
      for (size_t d = 0; d < dim; ++d)
        out[d] = out[d] * decay + share * load_element(values + p * dim + d);
      job.maximum[r] = maximum;
    }
  }
}

// Queries are rounded to int8, and the weights of a span, times the values' scales, to whole numbers
// of kMostWeight at most.
void attend_i8(const AttentionJob& job) {
  const size_t dim = job.head_dim;
  const int8_t* keys = static_cast<const int8_t*>(job.keys);
  const int8_t* values = static_cast<const int8_t*>(job.values);
  int8_t query[kMaxHeadDim];
  for (size_t r = 0; r < job.rows; ++r) {
    begin_row(job, r);
    const float query_scale = to_i8(job.queries + r * dim, dim, query);
    float* out = job.out + r * dim;
    for (size_t first = job.begin, next; first < job.end; first = next) {
      next = job.span_end(first);
      float weights[kScoreSpan] = {}, maximum = job.maximum[r];
      for (size_t p = first; p < next; ++p) {
        if (!is_seen(job, r, p)) continue;
        int32_t dot = 0;
        for (size_t d = 0; d < dim; ++d)
          dot += query[d] * keys[p / 16 * 16 * dim + d / 4 * 64 + p % 16 * 4 + d % 4];
        float score = static_cast<float>(dot) * (job.key_scales[p] * query_scale);
        if (job.cap > 0) score = job.cap * std::tanh(score / job.cap);
        weights[p - first] = score;
        maximum = std::fmax(maximum, score);
      }
      const float decay = std::exp2(job.maximum[r] - maximum);
      float total = 0, peak = 0, scaled = 0;
      for (size_t p = first; p < next; ++p) {
        float& weight = weights[p - first];
        weight = is_seen(job, r, p) ? std::exp2(weight - maximum) : 0.0f;
        total += weight;
        weight *= job.value_scales[p];
        scaled += weight;
        peak = std::fmax(peak, weight);
      }
      job.weight[r] = job.weight[r] * decay + total;
      job.maximum[r] = maximum;
      const float factor = has_codes(peak) ? kMostWeight / peak : 0.0f;
      const float unit = peak / kMostWeight + 0.0f * scaled;  // not finite where one is not
      for (size_t d = 0; d < dim; ++d) {
        int32_t sum = 0;
        for (size_t p = first; factor != 0 && p < next; ++p)
          sum += static_cast<int32_t>(std::lrint(weights[p - first] * factor)) *
                 values[(p / 4 * dim + d) * 4 + p % 4];
        out[d] = out[d] * decay + unit * static_cast<float>(sum);
      }
    }
  }
}

uint64_t int8_probe(size_t iterations) {
  int32_t sum = 0;
  for (size_t i = 0; i < iterations; ++i) {
    int32_t weight = 3;
    __asm__ volatile("" : "+r"(weight));
    sum += weight * 5;
  }
  __asm__ volatile("" : "+r"(sum));
  return iterations;
}

}  // namespace

const Kernels kScalarKernels = POCKETSLM_KERNELS("scalar");

}  // namespace pocketslm
