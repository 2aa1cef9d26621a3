// The reference: plain loops that say what every other path must compute.
#include <cmath>

#include "half.h"
#include "kernels.h"

namespace pocketslm {
namespace {

float load_element(const float* p) { return *p; }
float load_element(const uint16_t* p) { return half_to_float(*p); }
float load_element(const int8_t* p) { return *p; }

template <typename T>
void matmul_float(const uint8_t* blocks, size_t count, size_t cols, const ActivationTile& tile,
                  float* out, size_t out_stride) {
  const T* w = reinterpret_cast<const T*>(blocks);
  for (size_t b = 0; b < count; ++b, w += cols * kBlockRows)
    for (size_t t = 0; t < tile.tokens; ++t)
      for (size_t r = 0; r < kBlockRows; ++r) {
        float sum = 0;
        for (size_t k = 0; k < cols; ++k)
          sum += load_element(w + k * kBlockRows + r) * tile.values[t * tile.stride + k];
        out[t * out_stride + b * kBlockRows + r] = sum;
      }
}

template <WeightKind K>
int code_at(const uint8_t* group, const uint8_t* low, size_t row, size_t k) {
  if (K != WeightKind::q8_split && code_bits(K) == 8) return group[k / 4 * 64 + row * 4 + k % 4];
  const size_t at = k / 8 * 64 + row * 4 + k % 4;
  const int shift = k / 4 % 2 ? 4 : 0;
  const int code = group[at] >> shift & 15;
  return K == WeightKind::q8_split ? code << 4 | (low[at] >> shift & 15) : code;
}

template <WeightKind K>
void matmul(const uint8_t* blocks, size_t count, size_t cols, const ActivationTile& tile,
            float* out, size_t out_stride) {
  const BlockLayout layout = block_layout(K, cols);
  for (size_t b = 0; b < count; ++b, blocks += layout.bytes) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(blocks + layout.scales);
    const uint8_t* offsets = blocks + layout.offsets;
    for (size_t t = 0; t < tile.tokens; ++t)
      for (size_t r = 0; r < kBlockRows; ++r) {
        float sum = 0;
        for (size_t g = 0; g < cols / kGroup; ++g) {
          const int8_t* x = tile.codes + (g * tile.tokens + t) * kGroup;
          const size_t entry = g * kBlockRows + r;
          int zero = offset_of(K) == Offset::none ? 1 << (code_bits(K) - 1) : 0;
          if (offset_of(K) == Offset::zero_point) zero = offsets[entry];
          int dot = 0;
          for (size_t k = 0; k < kGroup; ++k)
            dot += (code_at<K>(blocks + g * group_bytes(K), offsets + g * group_bytes(K), r, k) - zero) * x[k];
          const float scale = half_to_float(scales[entry]);
          sum += static_cast<float>(dot) * (scale * tile.scales[g * tile.tokens + t]);
          if (offset_of(K) == Offset::minimum)
            sum += half_to_float(reinterpret_cast<const uint16_t*>(offsets)[entry]) *
                   tile.sums[g * tile.tokens + t];
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
    int sum = 0;
    for (size_t k = 0; k < kGroup; ++k) sum += codes[k];
    row.scales[g * row.tokens] = scale;
    row.sums[g * row.tokens] = scale * static_cast<float>(sum);
    row.corrections[g * row.tokens] = -8 * sum;
  }
}

void silu_mul(const float* gate, const float* up, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void to_f16(const float* x, size_t n, uint16_t* out) {
  for (size_t i = 0; i < n; ++i) out[i] = float_to_half(x[i]);
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

template <typename T>
void attend(const AttentionJob& job) {
  const T* keys = static_cast<const T*>(job.keys);
  const T* values = static_cast<const T*>(job.values);
  for (size_t r = 0; r < job.rows; ++r) {
    const float* query = job.queries + r * job.head_dim;
    float* out = job.out + r * job.head_dim;
    float maximum = -3.0e38f, weight = 0;
    for (size_t d = 0; d < job.head_dim; ++d) out[d] = 0;
    for (size_t p = job.begin; p < job.end && p < job.limits[r]; ++p) {
      const T* key = keys + p / kPositionBlock * kPositionBlock * job.head_dim + p % kPositionBlock;
      float score = 0;
      for (size_t d = 0; d < job.head_dim; ++d)
        score += query[d] * load_element(key + d * kPositionBlock);
      if (job.key_scales) score *= job.key_scales[p];
      const float previous = maximum;
      maximum = std::fmax(maximum, score);
      const float decay = std::exp(previous - maximum), share = std::exp(score - maximum);
      weight = weight * decay + share;
      const float factor = job.value_scales ? share * job.value_scales[p] : share;
      for (size_t d = 0; d < job.head_dim; ++d)
        out[d] = out[d] * decay + factor * load_element(values + p * job.head_dim + d);
    }
    job.maximum[r] = maximum;
    job.weight[r] = weight;
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

const Kernels kScalarKernels = {
    "scalar",
    {matmul_float<float>, matmul_float<uint16_t>, matmul<WeightKind::q4_sym>,
     matmul<WeightKind::q4_min>, matmul<WeightKind::q4_zp>, matmul<WeightKind::q8_sym>,
     matmul<WeightKind::q8_min>, matmul<WeightKind::q8_zp>, matmul<WeightKind::q8_split>},
    rms_norm,
    quantize,
    silu_mul,
    attend<uint16_t>,
    attend<int8_t>,
    to_f16,
    to_i8,
    weigh_scales,
    sum_exp,
    int8_probe,
};

}  // namespace pocketslm
