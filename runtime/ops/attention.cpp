// Attention of a session: rotation, norms of queries and keys, and the jobs that its kernels get.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "session.h"

namespace pocketslm {
namespace {

// Pieces of attention over all positions: `length` each from `begin` on, numbered from `first`.
constexpr struct {
  size_t begin, length, first;
} kPieces[] = {{0, 64, 0}, {512, 128, 8}, {2048, 512, 20}, {8192, 2048, 32},
               {SIZE_MAX, 0, SIZE_MAX}};
constexpr float kLog2E = 1.44269504f;

using Four = float __attribute__((vector_size(16)));
inline Four four_at(const float* x) {
  Four v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
inline void put_four(float* x, Four v) { std::memcpy(x, &v, sizeof(v)); }

// A Hadamard transform of each run of `n`'s largest power of two, 16 or more: it leaves products of two
// heads as they are, and spreads what a few channels hold over all, so that int8 codes lose less.
void spread(float* head, size_t n) {
  const size_t size = n & (~n + 1);
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  for (float* x = head; x < head + n; x += size) {
    for (size_t i = 0; i < size; i += 4) {
      const Four v = four_at(x + i);
      const Four pairs = __builtin_shufflevector(v, v, 1, 0, 3, 2) + v * Four{1, -1, 1, -1};
      put_four(x + i, __builtin_shufflevector(pairs, pairs, 2, 3, 0, 1) + pairs * Four{1, 1, -1, -1});
    }
    for (size_t half = 4; half < size; half *= 2)
      for (size_t i = 0; i < size; i += 2 * half)
        for (size_t j = i; j < i + half; j += 4) {
          const Four a = four_at(x + j), b = four_at(x + j + half);
          put_four(x + j, a + b), put_four(x + j + half, a - b);
        }
    for (size_t i = 0; i < size; ++i) x[i] *= scale;
  }
}

// One query head's attention, as its pieces are added in order.
class Joined {
 public:
  Joined() = default;
  Joined(float* out, size_t dim) : out_(out), dim_(dim) {}
  void add(const float* piece, float maximum, float weight) {
    if (weight == 0) return;  // none of its positions is seen
    if (weight_ == 0) {
      maximum_ = maximum, weight_ = weight;
      std::memcpy(out_, piece, dim_ * sizeof(float));
      return;
    }
    const float peak = std::max(maximum_, maximum);
    const float decay = std::exp2(maximum_ - peak), factor = std::exp2(maximum - peak);
    maximum_ = peak;
    weight_ = weight_ * decay + weight * factor;
    for (size_t d = 0; d < dim_; ++d) out_[d] = out_[d] * decay + piece[d] * factor;
  }
  void finish() {
    const float inverse = 1.0f / weight_;
    for (size_t d = 0; d < dim_; ++d) out_[d] *= inverse;
  }

 private:
  float* out_ = nullptr;
  size_t dim_ = 0;
  float maximum_ = 0, weight_ = 0;
};

}  // namespace

// Rotates the pairs (i, i + rope_dim / 2) of one head.
void Session::rotate(const Step& step, float* head, size_t row) const {
  if (step.rotary == kNone) return;
  const size_t half = program_.rotaries[step.rotary].half;
  const float* cosine = cosines_[step.rotary].data() + row * half;
  const float* sine = sines_[step.rotary].data() + row * half;
  for (size_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

// One head, in place: rotated, and normalized before or after that.
void Session::prepare_head(const Step& step, const float* norm, float* head, size_t row) const {
  const bool after = step.has(AttendFlag::norm_after_rope);
  const auto normalize = [&] {
    kernels_.rms_norm(head, norm, step.head_dim, step.norm.eps, head);
  };
  if (norm && !after) normalize();
  rotate(step, head, row);
  if (norm && after) normalize();
}

// Rotates and scales `heads` query heads in place; scores become logarithms to base 2.
void Session::prepare_queries(const Step& step, const Run& run, size_t row, size_t heads,
                              float* queries) {
  const size_t dim = step.head_dim;
  float scale = step.scale * kLog2E;
  if (step.temperature_step) {
    const size_t steps = run.position(row) / step.temperature_step;
    scale *= 1.0f + step.temperature * std::log1p(static_cast<float>(steps));
  }
  for (size_t h = 0; h < heads; ++h) prepare_head(step, step.query_norm, queries + h * dim, row);
  for (size_t i = 0; i < heads * dim; ++i) queries[i] *= scale;
  for (size_t h = 0; run.context->states.type() == PSLM_KV_I8 && h < heads; ++h)
    spread(queries + h * dim, dim);
}

void Session::store(const Step& step, const Run& run, size_t head, size_t row) {
  const size_t dim = step.head_dim, at = (row * step.kv_heads + head) * dim;
  float* key = buffer(BufferId::key) + at;
  prepare_head(step, step.key_norm, key, row);
  if (run.context->states.type() == PSLM_KV_I8) spread(key, dim);
  run.context->states.store(step.state, head, run.position(row), key,
                            buffer(BufferId::value) + at);
}

// Asks for the memory that a few tokens' keys and values will fill, before their products are computed.
void Session::expect_stores(unsigned m, const Step& step) {
  if (step.has(AttendFlag::reads_only)) return;
  const auto [begin, end] = pool_.share_of(m, step.kv_heads);
  for (const Run& run : runs_)
    for (size_t t = run.first; t < run.last(); ++t)
      for (size_t head = begin; head < end; ++head)
        run.context->states.expect(step.state, head, run.position(t));
}

// The positions that a token of the batch sees.
Session::Seen Session::seen_by(const Step& step, const Run& run, size_t row) {
  const size_t here = run.position(row), end = run.position(run.last());
  const size_t reach = step.window ? step.window - 1 : end;
  return {here > reach ? here - reach : 0,
          step.has(AttendFlag::bidirectional) ? std::min(here + reach + 1, end) : here + 1};
}

// Attention is summed up in pieces whose borders are the same positions for every token: one alone
// gets the bits that it gets in a batch. They are small enough to keep all threads busy, and few
// enough that joining them stays cheap.
size_t Session::piece_at(const Step& step, size_t position) {
  if (step.window) return position / window_piece(step.window);
  const auto* part = kPieces;
  while (position >= part[1].begin) ++part;
  return part->first + (position - part->begin) / part->length;
}

size_t Session::piece_begin(const Step& step, size_t piece) {
  if (step.window) return piece * window_piece(step.window);
  const auto* part = kPieces;
  while (piece >= part[1].first) ++part;
  return part->begin + (piece - part->first) * part->length;
}

Session::Pieces Session::pieces_of(const Step& step, const Seen& seen) {
  const size_t first = piece_at(step, seen.begin);
  return {first, piece_at(step, seen.end - 1) + 1 - first};
}

// How many pieces one token sees at most.
size_t Session::most_pieces(const Step& step, size_t context) {
  const size_t all = piece_at(step, context) + 1;
  return step.window ? std::min(all, step.window / window_piece(step.window) + 2) : all;
}

// Where what is read of a piece begins: keys of `all` positions that a job sees.
const void* Session::keys_of(const Step& step, const States& states, size_t head, size_t piece,
                             const Seen& all) {
  const size_t begin = std::max(piece_begin(step, piece), all.begin / kPositionBlock * kPositionBlock);
  return states.keys_at(step.state, head, begin);
}

// The job's rows over a piece of `all` positions that one of them sees. `seen`: what each row sees.
void Session::attend_piece(const Step& step, const States& states, size_t head, size_t piece,
                           const Seen& all, const Seen* seen, AttentionJob& job) {
  const size_t first = piece_begin(step, piece), end = std::min(piece_begin(step, piece + 1), all.end);
  const size_t begin = std::max(first, all.begin / kPositionBlock * kPositionBlock);
  // Positions of the job are places in the ring, which pieces never pass.
  const size_t shift = first - states.place_of(step.state, first);
  uint32_t limits[kMaxQueryRows], starts[kMaxQueryRows];
  for (size_t r = 0; r < job.rows; ++r) {
    limits[r] = static_cast<uint32_t>(seen[r].end > shift ? seen[r].end - shift : 0);
    starts[r] = static_cast<uint32_t>(seen[r].begin > shift ? seen[r].begin - shift : 0);
  }
  job.head_dim = step.head_dim;
  job.cap = step.cap * kLog2E;
  job.limits = limits, job.starts = step.window ? starts : nullptr;
  job.first = first - shift, job.begin = begin - shift, job.end = end - shift;
  states.describe(step.state, head, job);
  (states.type() == PSLM_KV_I8 ? kernels_.attend_i8 : kernels_.attend_f16)(job);
}

void Session::attend(unsigned m, const Step& step) {
  count_ <= kFewTokens && runs_.size() == 1 ? attend_few(m, step) : attend_many(m, step);
}

// The job of `heads` query heads, from `query_head` on, of the tokens [first, last): rows by token.
// They are made ready here where they are not `prepared`.
AttentionJob Session::job_of(unsigned m, const Step& step, const Run& run, size_t first,
                             size_t last, size_t query_head, size_t heads, bool prepared,
                             Rows& rows) {
  Member& member = members_[m];
  for (size_t t = first; t < last; ++t) {
    const size_t row = (t - first) * heads;
    float* queries = &member.queries[row * step.head_dim];
    std::memcpy(queries, buffer(BufferId::query) + t * step.width + query_head * step.head_dim,
                heads * step.head_dim * sizeof(float));
    if (!prepared) prepare_queries(step, run, t, heads, queries);
    std::fill_n(rows.seen + row, heads, seen_by(step, run, t));
  }
  AttentionJob job{};
  job.rows = (last - first) * heads, job.queries = member.queries.data();
  job.out = member.attended.data(), job.maximum = rows.maximum, job.weight = rows.weight;
  return job;
}

// A token or a few of one context: (KV head, tile of tokens, piece) items, joined when all are there;
// of one token by whoever reads it, if `gathers` does not say otherwise.
void Session::attend_few(unsigned m, const Step& step) {
  const Run& run = runs_.front();
  const size_t dim = step.head_dim, group = step.heads / step.kv_heads;
  const size_t tokens = std::max<size_t>(1, kMaxQueryRows / group);
  const size_t tiles = (count_ + tokens - 1) / tokens;
  const Seen all{seen_by(step, run, 0).begin, seen_by(step, run, count_ - 1).end};
  const Pieces pieces = pieces_of(step, all);
  const bool prepared = tiles > 1;
  if (prepared) prepare_all(m, step);
  Rows rows;
  AttentionJob job{};
  size_t of_job = SIZE_MAX;  // whose job it is: a thread's next piece is most often of the same rows
  const size_t total = step.kv_heads * pieces.count;
  // Of what a thread reads, most pages at once.
  const auto [own, others] = pool_.share_of(m, total);
  for (size_t item = own; item < others; ++item)
    touch(step, run.context->states, item / pieces.count, pieces.first + item % pieces.count, all);
  share(m, total * tiles, 1, [&](size_t begin, size_t end) {
    for (size_t item = begin; item < end; ++item) {
      // In the order of memory, which kernels ask for ahead.
      const size_t head = item / (tiles * pieces.count);
      const size_t at = item / tiles % pieces.count, tile = item % tiles;
      const size_t first = tile * tokens, last = std::min(first + tokens, count_);
      for (size_t t = first; t < last && !prepared && !step.has(AttendFlag::reads_only); ++t)
        if (piece_at(step, run.position(t)) == pieces.first + at) store(step, run, head, t);
      for (size_t r = 0; r < group; r += kMaxQueryRows) {
        const size_t heads = std::min(kMaxQueryRows, group - r), query_head = head * group + r;
        const size_t id = tile * step.heads + query_head;
        if (id != of_job)
          job = job_of(m, step, run, first, last, query_head, heads, prepared, rows);
        of_job = id;
        const size_t next = (item + 1) / tiles;
        job.next = next == item / tiles || next == total
                       ? nullptr
                       : keys_of(step, run.context->states, next / pieces.count,
                                 pieces.first + next % pieces.count, all);
        attend_piece(step, run.context->states, head, pieces.first + at, all, rows.seen, job);
        for (size_t row = 0; row < job.rows; ++row) {
          const size_t of = (first + row / heads) * step.heads + query_head + row % heads;
          const size_t piece = of * pieces.count + at;
          std::memcpy(&piece_out_[piece * dim], job.out + row * dim, dim * sizeof(float));
          piece_maximum_[piece] = rows.maximum[row];
          piece_weight_[piece] = rows.weight[row];
        }
      }
    }
  });
  if (count_ == 1 && !step.gathers) return;
  share(m, count_ * step.heads, 1, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row)
      join(step, pieces.count, row,
           buffer(BufferId::attended) + row / step.heads * step.width + row % step.heads * dim);
  });
}

// One head's attention of one token, from its pieces; `row` counts heads, token after token.
void Session::join(const Step& step, size_t count, size_t row, float* out) const {
  Joined joined(out, step.head_dim);
  for (size_t piece = row * count; piece < (row + 1) * count; ++piece)
    joined.add(piece_out_.data() + piece * step.head_dim, piece_maximum_.data()[piece],
               piece_weight_.data()[piece]);
  joined.finish();
}

// Stores keys and values of the batch, and makes its queries ready in place.
void Session::prepare_all(unsigned m, const Step& step) {
  const size_t group = step.heads / step.kv_heads, total = step.kv_heads * count_;
  const bool stores = !step.has(AttendFlag::reads_only);
  share(m, total, (total + 4 * threads() - 1) / (4 * threads()), [&](size_t begin, size_t end) {
    for (size_t item = begin; item < end; ++item) {
      const size_t head = item / count_, row = item % count_;
      const Run* run = runs_.data();
      while (row >= run->last()) ++run;
      if (stores) store(step, *run, head, row);
      float* queries = buffer(BufferId::query) + row * step.width + head * group * step.head_dim;
      prepare_queries(step, *run, row, group, queries);
    }
  });
}

// A batch: tiles of consecutive tokens of one KV head. All heads are made ready first, but where no
// context has two tiles: then each tile's are by its own thread.
void Session::attend_many(unsigned m, const Step& step) {
  const size_t dim = step.head_dim, group = step.heads / step.kv_heads;
  const size_t tokens = std::max<size_t>(1, kMaxQueryRows / group);
  const auto tiles_of = [&](const Run& run) { return (run.count + tokens - 1) / tokens; };
  size_t tiles = 0;
  for (const Run& run : runs_) tiles += tiles_of(run);
  const bool prepared = tiles > runs_.size();
  if (prepared) prepare_all(m, step);
  struct Tile {
    const Run& run;
    size_t first, last;
    Seen all;
    Pieces pieces;
  };
  const auto tile_of = [&](size_t item) {
    // Longest first, so that the last items to be taken are short ones.
    size_t tile = tiles - 1 - item / step.kv_heads;
    const Run* of = runs_.data();
    while (tile >= tiles_of(*of)) tile -= tiles_of(*of++);
    const size_t first = of->first + tile * tokens, last = std::min(first + tokens, of->last());
    const Seen all{seen_by(step, *of, first).begin, seen_by(step, *of, last - 1).end};
    return Tile{*of, first, last, all, pieces_of(step, all)};
  };
  const auto [own, others] = pool_.share_of(m, tiles * step.kv_heads);
  for (size_t item = own; item < others && count_ <= kMaxTile; ++item) {
    const Tile tile = tile_of(item);
    for (size_t piece = 0; piece < tile.pieces.count; ++piece)
      touch(step, tile.run.context->states, item % step.kv_heads, tile.pieces.first + piece,
            tile.all);
  }
  share(m, tiles * step.kv_heads, 1, [&](size_t begin, size_t end) {
    for (size_t item = begin; item < end; ++item) {
      const size_t head = item % step.kv_heads;
      const auto [run, first, last, all, pieces] = tile_of(item);
      for (size_t t = first; t < last && !prepared && !step.has(AttendFlag::reads_only); ++t)
        store(step, run, head, t);
      for (size_t r = 0; r < group; r += kMaxQueryRows) {
        const size_t heads = std::min(kMaxQueryRows, group - r), query_head = head * group + r;
        Rows rows;
        AttentionJob job =
            job_of(m, step, run, first, last, query_head, heads, prepared, rows);
        Joined joined[kMaxQueryRows];
        for (size_t row = 0; row < job.rows; ++row)
          joined[row] = Joined(buffer(BufferId::attended) + (first + row / heads) * step.width +
                                   (query_head + row % heads) * dim,
                               dim);
        for (size_t piece = pieces.first; piece < pieces.first + pieces.count; ++piece) {
          const bool more = piece + 1 < pieces.first + pieces.count;
          job.next = more || head + 1 < step.kv_heads
                         ? keys_of(step, run.context->states, more ? head : head + 1,
                                   more ? piece + 1 : pieces.first, all)
                         : nullptr;
          attend_piece(step, run.context->states, head, piece, all, rows.seen, job);
          for (size_t row = 0; row < job.rows; ++row)
            joined[row].add(job.out + row * dim, rows.maximum[row], rows.weight[row]);
        }
        for (size_t row = 0; row < job.rows; ++row) joined[row].finish();
      }
    }
  });
}

}  // namespace pocketslm
