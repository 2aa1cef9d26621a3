// Attention of a session: rotation, the cache, and the jobs that its kernels get.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "session.h"

namespace pocketslm {

// Rotates the pairs (i, i + rope_dim / 2) of one head.
void Session::rotate(float* head, size_t token) const {
  const size_t half = model_.config.rope_dim / 2;
  const float* cosine = cosines_.data() + token * half;
  const float* sine = sines_.data() + token * half;
  for (size_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

// Rotated and scaled copies of `heads` query heads.
void Session::prepare_queries(size_t token, const float* q, size_t heads, float* out) {
  const size_t dim = model_.config.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  std::memcpy(out, q, heads * dim * sizeof(float));
  for (size_t h = 0; h < heads; ++h) rotate(out + h * dim, token);
  for (size_t i = 0; i < heads * dim; ++i) out[i] *= scale;
}

// One token: (KV head, span of positions) pieces, joined by attention_output.
void Session::attend_one(unsigned m, size_t index) {
  const Layer& c = model_.layers[index];
  const size_t dim = model_.config.head_dim, group = c.heads / c.kv_heads, end = length_ + 1;
  share(m, c.kv_heads * spans_, 1, [&](size_t first, size_t last) {
    Member& member = members_[m];
    for (size_t item = first; item < last; ++item) {
      const size_t head = item / spans_, span = item % spans_;
      if (span + 1 == spans_) {
        rotate(&k_[head * dim], 0);
        cache_.store(index, head, length_, &k_[head * dim], &v_[head * dim]);
      }
      uint32_t limits[kMaxQueryRows];
      std::fill_n(limits, kMaxQueryRows, static_cast<uint32_t>(end));
      for (size_t r = 0; r < group; r += kMaxQueryRows) {
        const size_t rows = std::min(kMaxQueryRows, group - r);
        const size_t query_head = head * group + r;
        prepare_queries(0, &q_[query_head * dim], rows, member.queries.data());
        float maximum[kMaxQueryRows], weight[kMaxQueryRows];
        AttentionJob job{};
        job.rows = rows, job.head_dim = dim;
        job.begin = span * span_, job.end = std::min(end, (span + 1) * span_);
        job.queries = member.queries.data(), job.limits = limits;
        job.out = member.attended.data(), job.maximum = maximum, job.weight = weight;
        cache_.describe(index, head, job);
        (cache_.type() == PSLM_KV_I8 ? kernels_.attend_i8 : kernels_.attend_f16)(job);
        for (size_t i = 0; i < rows; ++i) {
          const size_t piece = (query_head + i) * spans_ + span;
          std::memcpy(&piece_out_[piece * dim], job.out + i * dim, dim * sizeof(float));
          piece_maximum_[piece] = maximum[i];
          piece_weight_[piece] = weight[i];
        }
      }
    }
  });
}

// A batch: all keys and values first, then tiles of consecutive tokens of one KV head.
void Session::attend_many(unsigned m, size_t index) {
  const Layer& c = model_.layers[index];
  const size_t dim = model_.config.head_dim, group = c.heads / c.kv_heads;
  const size_t query_width = c.heads * dim, kv_width = c.kv_heads * dim;
  share(m, c.kv_heads, 1, [&](size_t begin, size_t end) {
    for (size_t head = begin; head < end; ++head)
      for (size_t t = 0; t < count_; ++t) {
        float* key = &k_[t * kv_width + head * dim];
        rotate(key, t);
        cache_.store(index, head, length_ + t, key, &v_[t * kv_width + head * dim]);
      }
  });

  const size_t tokens = std::max<size_t>(1, kMaxQueryRows / group);
  const size_t tiles = (count_ + tokens - 1) / tokens;
  share(m, tiles * c.kv_heads, 1, [&](size_t begin, size_t end) {
    Member& member = members_[m];
    for (size_t item = begin; item < end; ++item) {
      // Longest first, so that the last items to be taken are short ones.
      const size_t tile = tiles - 1 - item / c.kv_heads, head = item % c.kv_heads;
      const size_t first = tile * tokens, last = std::min(first + tokens, count_);
      for (size_t r = 0; r < group; r += kMaxQueryRows) {
        const size_t heads = std::min(kMaxQueryRows, group - r);
        const size_t query_head = head * group + r;
        uint32_t limits[kMaxQueryRows];
        float maximum[kMaxQueryRows], weight[kMaxQueryRows];
        for (size_t t = first; t < last; ++t) {
          const size_t row = (t - first) * heads;
          prepare_queries(t, &q_[t * query_width + query_head * dim], heads,
                          &member.queries[row * dim]);
          std::fill_n(limits + row, heads, static_cast<uint32_t>(length_ + t + 1));
        }
        AttentionJob job{};
        job.rows = (last - first) * heads, job.head_dim = dim;
        job.begin = 0, job.end = length_ + last;
        job.queries = member.queries.data(), job.limits = limits;
        job.out = member.attended.data(), job.maximum = maximum, job.weight = weight;
        cache_.describe(index, head, job);
        (cache_.type() == PSLM_KV_I8 ? kernels_.attend_i8 : kernels_.attend_f16)(job);
        for (size_t t = first; t < last; ++t)
          for (size_t h = 0; h < heads; ++h) {
            const size_t row = (t - first) * heads + h;
            const float inverse = 1.0f / weight[row];
            float* out = &attended_[t * query_width + (query_head + h) * dim];
            for (size_t d = 0; d < dim; ++d) out[d] = job.out[row * dim + d] * inverse;
          }
      }
    }
  });
}

// The attention result, quantized for the output projection.
const Panel& Session::attention_output(unsigned m, const Layer& layer) {
  const size_t dim = model_.config.head_dim, width = layer.heads * dim;
  if (count_ == 1) {
    Member& member = members_[m];
    float* out = member.normed.data();
    for (size_t head = 0; head < layer.heads; ++head, out += dim) {
      const float* maxima = &piece_maximum_[head * spans_];
      const float maximum = *std::max_element(maxima, maxima + spans_);
      std::fill_n(out, dim, 0.0f);
      float total = 0;
      for (size_t span = 0; span < spans_; ++span) {
        const size_t piece = head * spans_ + span;
        const float factor = std::exp(piece_maximum_[piece] - maximum);
        total += factor * piece_weight_[piece];
        for (size_t d = 0; d < dim; ++d) out[d] += factor * piece_out_[piece * dim + d];
      }
      const float inverse = 1.0f / total;
      for (size_t d = 0; d < dim; ++d) out[d] *= inverse;
    }
    member.panel.describe(1, width, member.normed.data());
    kernels_.quantize(member.normed.data(), width / kGroup, member.panel.row(0, 0, 0));
    return member.panel;
  }
  if (m == 0) panel_.describe(count_, width, attended_.data());
  barrier(m);
  share(m, (count_ + kMaxTile - 1) / kMaxTile, 1, [&](size_t begin, size_t end) {
    for (size_t t = begin * kMaxTile; t < std::min(end * kMaxTile, count_);) {
      const size_t tile = tile_size(count_ - t);
      for (size_t i = 0; i < tile; ++i)
        kernels_.quantize(&attended_[(t + i) * width], width / kGroup, panel_.row(t, i, 0));
      t += tile;
    }
  });
  return panel_;
}

}  // namespace pocketslm
