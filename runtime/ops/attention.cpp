// Attention of a session: rotation, norms of queries and keys, and the jobs that its kernels get.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "session.h"

namespace pocketslm {

// Rotates the pairs (i, i + rope_dim / 2) of one head.
void Session::rotate(const Step& step, float* head, size_t token) const {
  if (step.rotary == kNone) return;
  const size_t half = program_.rotaries[step.rotary].half;
  const float* cosine = cosines_[step.rotary].data() + token * half;
  const float* sine = sines_[step.rotary].data() + token * half;
  for (size_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

// One head, in place: rotated, and normalized before or after that.
void Session::prepare_head(const Step& step, const float* norm, float* head, size_t token) const {
  const bool after = step.has(AttendFlag::norm_after_rope);
  const auto normalize = [&] {
    kernels_.rms_norm(head, norm, step.head_dim, step.norm.eps, head);
  };
  if (norm && !after) normalize();
  rotate(step, head, token);
  if (norm && after) normalize();
}

// Prepared and scaled copies of `heads` query heads.
void Session::prepare_queries(const Step& step, size_t token, const float* q, size_t heads,
                              float* out) {
  const size_t dim = step.head_dim;
  float scale = step.scale;
  if (step.temperature_step) {
    const size_t steps = (length_ + token) / step.temperature_step;
    scale *= 1.0f + step.temperature * std::log1p(static_cast<float>(steps));
  }
  std::memcpy(out, q, heads * dim * sizeof(float));
  for (size_t h = 0; h < heads; ++h) prepare_head(step, step.query_norm, out + h * dim, token);
  for (size_t i = 0; i < heads * dim; ++i) out[i] *= scale;
}

void Session::store(const Step& step, size_t head, size_t token) {
  const size_t dim = step.head_dim, at = (token * step.kv_heads + head) * dim;
  float* key = buffer(BufferId::key) + at;
  prepare_head(step, step.key_norm, key, token);
  states_.store(step.state, head, length_ + token, key, buffer(BufferId::value) + at);
}

// The positions that a token of the batch sees.
Session::Seen Session::seen_by(const Step& step, size_t token) const {
  const size_t here = length_ + token, reach = step.window ? step.window - 1 : here + count_;
  return {here > reach ? here - reach : 0, step.has(AttendFlag::bidirectional)
                                               ? std::min(here + reach + 1, length_ + count_)
                                               : here + 1};
}

// Enough spans to keep every thread busy, few enough that joining them stays cheap.
Session::Spans Session::spans_of(const Step& step) const {
  const Seen seen = seen_by(step, 0);
  const size_t begin = seen.begin / kPositionBlock * kPositionBlock, positions = seen.end - begin;
  size_t length = std::max<size_t>(positions / (8 * pool_.size()), 64);
  length = std::max(length, (positions - 1 + kMaxSpans) / kMaxSpans);
  length = round_up(length, kPositionBlock);
  return {begin, seen.end, length, (positions - 1 + length) / length};
}

// The job's rows over positions [begin, end), whose begin is a multiple of 16; in two parts where a
// ring is passed. `seen`: what each row sees.
void Session::attend_over(const Step& step, size_t head, size_t begin, size_t end,
                          const Seen* seen, AttentionJob& job) {
  const auto kernel =
      states_.type() == PSLM_KV_I8 ? kernels_.attend_i8 : kernels_.attend_f16;
  const size_t room = states_.room(step.state);
  uint32_t limits[kMaxQueryRows], starts[kMaxQueryRows];
  job.head_dim = step.head_dim;
  job.cap = step.cap;
  job.limits = limits, job.starts = step.window ? starts : nullptr;
  states_.describe(step.state, head, job);
  for (size_t at = begin; at < end; at += job.end - job.begin) {
    // Positions of the job are places in the ring.
    const size_t place = at < room ? at : at % room, shift = at - place;
    for (size_t r = 0; r < job.rows; ++r) {
      limits[r] = static_cast<uint32_t>(seen[r].end > shift ? seen[r].end - shift : 0);
      starts[r] = static_cast<uint32_t>(seen[r].begin > shift ? seen[r].begin - shift : 0);
    }
    job.begin = place, job.end = std::min(end - shift, room);
    job.resumes = at != begin;
    kernel(job);
  }
}

void Session::attend(unsigned m, const Step& step) {
  count_ == 1 ? attend_one(m, step) : attend_many(m, step);
}

// One token: (KV head, span of positions) pieces, joined by whoever reads them.
void Session::attend_one(unsigned m, const Step& step) {
  const size_t dim = step.head_dim, group = step.heads / step.kv_heads;
  const Spans spans = spans_of(step);
  Seen seen[kMaxQueryRows];
  std::fill_n(seen, kMaxQueryRows, seen_by(step, 0));
  share(m, step.kv_heads * spans.count, 1, [&](size_t first, size_t last) {
    Member& member = members_[m];
    for (size_t item = first; item < last; ++item) {
      const size_t head = item / spans.count, span = item % spans.count;
      if (span + 1 == spans.count && !step.has(AttendFlag::reads_only)) store(step, head, 0);
      const size_t begin = spans.begin + span * spans.length;
      for (size_t r = 0; r < group; r += kMaxQueryRows) {
        const size_t rows = std::min(kMaxQueryRows, group - r);
        const size_t query_head = head * group + r;
        prepare_queries(step, 0, buffer(BufferId::query) + query_head * dim, rows,
                        member.queries.data());
        float maximum[kMaxQueryRows], weight[kMaxQueryRows];
        AttentionJob job{};
        job.rows = rows, job.queries = member.queries.data();
        job.out = member.attended.data(), job.maximum = maximum, job.weight = weight;
        attend_over(step, head, begin, std::min(spans.end, begin + spans.length), seen, job);
        for (size_t i = 0; i < rows; ++i) {
          const size_t piece = (query_head + i) * spans.count + span;
          std::memcpy(&piece_out_[piece * dim], job.out + i * dim, dim * sizeof(float));
          piece_maximum_[piece] = maximum[i];
          piece_weight_[piece] = weight[i];
        }
      }
    }
  });
  if (!step.gathers) return;
  share(m, step.heads, 1, [&](size_t begin, size_t end) {
    for (size_t head = begin; head < end; ++head)
      join(step, spans, head, buffer(BufferId::attended) + head * dim);
  });
}

// One head's attention of one token, from its pieces.
void Session::join(const Step& step, const Spans& spans, size_t head, float* out) const {
  const size_t dim = step.head_dim;
  const float* maxima = piece_maximum_.data() + head * spans.count;
  const float* weights = piece_weight_.data() + head * spans.count;
  const float maximum = *std::max_element(maxima, maxima + spans.count);
  std::fill_n(out, dim, 0.0f);
  float total = 0;
  for (size_t span = 0; span < spans.count; ++span) {
    const float* piece = piece_out_.data() + (head * spans.count + span) * dim;
    const float factor = std::exp(maxima[span] - maximum);
    total += factor * weights[span];
    for (size_t d = 0; d < dim; ++d) out[d] += factor * piece[d];
  }
  const float inverse = 1.0f / total;
  for (size_t d = 0; d < dim; ++d) out[d] *= inverse;
}

// A batch: all keys and values first, then tiles of consecutive tokens of one KV head.
void Session::attend_many(unsigned m, const Step& step) {
  const size_t dim = step.head_dim, group = step.heads / step.kv_heads;
  if (!step.has(AttendFlag::reads_only))
    share(m, step.kv_heads, 1, [&](size_t begin, size_t end) {
      for (size_t head = begin; head < end; ++head)
        for (size_t t = 0; t < count_; ++t) store(step, head, t);
    });

  const size_t tokens = std::max<size_t>(1, kMaxQueryRows / group);
  const size_t tiles = (count_ + tokens - 1) / tokens;
  share(m, tiles * step.kv_heads, 1, [&](size_t begin, size_t end) {
    Member& member = members_[m];
    for (size_t item = begin; item < end; ++item) {
      // Longest first, so that the last items to be taken are short ones.
      const size_t tile = tiles - 1 - item / step.kv_heads, head = item % step.kv_heads;
      const size_t first = tile * tokens, last = std::min(first + tokens, count_);
      const size_t from = seen_by(step, first).begin / kPositionBlock * kPositionBlock;
      for (size_t r = 0; r < group; r += kMaxQueryRows) {
        const size_t heads = std::min(kMaxQueryRows, group - r);
        const size_t query_head = head * group + r;
        Seen seen[kMaxQueryRows];
        float maximum[kMaxQueryRows], weight[kMaxQueryRows];
        for (size_t t = first; t < last; ++t) {
          const size_t row = (t - first) * heads;
          prepare_queries(step, t, buffer(BufferId::query) + t * step.width + query_head * dim,
                          heads, &member.queries[row * dim]);
          std::fill_n(seen + row, heads, seen_by(step, t));
        }
        AttentionJob job{};
        job.rows = (last - first) * heads, job.queries = member.queries.data();
        job.out = member.attended.data(), job.maximum = maximum, job.weight = weight;
        attend_over(step, head, from, seen_by(step, last - 1).end, seen, job);
        for (size_t t = first; t < last; ++t)
          for (size_t h = 0; h < heads; ++h) {
            const size_t row = (t - first) * heads + h;
            const float inverse = 1.0f / weight[row];
            float* out = buffer(BufferId::attended) + t * step.width + (query_head + h) * dim;
            for (size_t d = 0; d < dim; ++d) out[d] = job.out[row * dim + d] * inverse;
          }
      }
    }
  });
}

}  // namespace pocketslm
