// The output head of a session: logits, the most probable tokens, and a shortcut to the greedy one.
//
// A split head (weight_layout.h) gives the greedy token without reading all of it. Its high nibbles
// give each logit up to an error, the product of the low nibbles, less their mean, with the
// activations. Low nibbles of rounded weights are as good as uniform on 0..15, with a variance of
// (16^2 - 1) / 12, so the error has a known standard deviation. Blocks of rows whose logits may
// still be highest, within kDeviations of these, are then computed in full.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "finite.h"
#include "session.h"

namespace pocketslm {
namespace {

constexpr float kMeanNibble = 7.5f;
constexpr float kNibbleVariance = 255.0f / 12.0f;
// A row is lost with a probability of 10^-12.
constexpr float kDeviations = 7.0f;
constexpr size_t kOpenAhead = 4;  // blocks between asking for scales and using them

// The largest magnitude of a block's fp16 scales, never 0.
uint16_t largest_half(const uint16_t* x) {
  uint16_t largest = 1;
  for (size_t r = 0; r < kBlockRows; ++r)
    largest = std::max(largest, static_cast<uint16_t>(x[r] & 0x7fff));
  return largest;
}

}  // namespace

void Session::forward_greedy(const int32_t* tokens, size_t count, size_t following,
                             const pslm_penalty* penalty, int32_t* next) {
  trust_logits();
  const size_t first = count - following;  // whose successor is wanted
  for (size_t done = 0; done < count;) {
    size_t part = std::min(batch_, count - done);
    if (following > 1) part = std::min(part, done < first ? first - done : kMaxTile);
    const bool followed = done + part > first;
    head_rows_ = std::min(part, following);
    penalizes_ = false;
    for (size_t t = 0; followed && t < head_rows_; ++t) {
      const size_t later = count - (done + part - head_rows_ + t) - 1;  // tokens behind this one
      penalize(t, penalty, penalty && penalty->count > later ? penalty->count - later : 0);
    }
    run(tokens + done, part, followed ? Head::greedy : Head::none, nullptr);
    done += part;
    for (size_t t = 0; followed && t < head_rows_; ++t) *next++ = best(t);
  }
}

// Threads find room for what they keep, since none may run out of memory.
void Session::ask(const std::vector<Asked>& asked) {
  asked_ = asked;
  for (Member& member : members_)
    for (size_t i = 0; i < asked.size(); ++i) member.found[i].top.reserve(asked[i].top);
}

// Tells the head that the first `count` tokens of a penalty were seen by one of its rows.
void Session::penalize(size_t row, const pslm_penalty* penalty, size_t count) {
  Penalized& own = penalized_[row];
  own.factor = penalty && count ? penalty->factor : 1;
  if (!(own.factor > 1)) return;
  penalizes_ = true;
  own.seen.assign((model_.config.vocab_size + 63) / 64, 0);
  for (size_t i = 0; i < count; ++i) {
    const auto token = static_cast<uint32_t>(penalty->seen[i]);
    own.seen[token / 64] |= uint64_t{1} << token % 64;
  }
}

// The best of what threads found behind a token.
int32_t Session::best(size_t token) const {
  Candidate best = members_[0].found[token].best;
  for (const Member& member : members_) best = std::min(best, member.found[token].best);
  return best.token;
}

bool Session::finite() const {
  return std::all_of(members_.begin(), members_.end(), [](const Member& m) { return m.finite; });
}

double Session::forward_top(const int32_t* tokens, size_t count, size_t top, int32_t* best,
                            float* logits) {
  trust_logits();
  head_rows_ = 1;
  ask({{nullptr, top}});
  for (size_t done = 0; done < count;) {
    const size_t part = std::min(batch_, count - done);
    run(tokens + done, part, done + part == count ? Head::asked : Head::none, nullptr);
    done += part;
  }
  return highest(0, best, logits);
}

// The highest logits of what threads found behind a token, as many as were asked for; returns the
// logarithm of the sum of exp over all.
double Session::highest(size_t token, int32_t* best, float* logits) const {
  if (!finite()) return std::numeric_limits<double>::quiet_NaN();
  std::vector<Candidate> all;
  float peak = -std::numeric_limits<float>::infinity();
  for (const Member& member : members_) {
    const Found& found = member.found[token];
    all.insert(all.end(), found.top.begin(), found.top.end());
    peak = std::max(peak, found.peak);
  }
  double total = 0;
  for (const Member& member : members_) {
    const Found& found = member.found[token];
    if (found.sum > 0) total += static_cast<double>(found.sum) * std::exp(found.peak - peak);
  }
  std::sort(all.begin(), all.end());
  for (size_t i = 0; i < asked_[token].top; ++i) best[i] = all[i].token, logits[i] = all[i].logit;
  return peak + std::log(total);
}

// Keeps the highest of a token's logits. What is not finite is no candidate.
void Session::offer_best(Member& member, size_t token, const float* logits, size_t count,
                         size_t first_token) {
  member.finite &= all_finite(logits, count);
  if (!member.finite) return;
  Candidate& best = member.found[token].best;
  const auto& [factor, seen] = penalized_[token];
  for (size_t i = 0; i < count; ++i) {
    const size_t id = first_token + i;
    float logit = logits[i];
    if (factor > 1 && seen[id / 64] >> id % 64 & 1) logit = logit < 0 ? logit * factor : logit / factor;
    best = std::min(best, Candidate{logit, static_cast<int32_t>(id)});
  }
}

// Keeps the highest of these logits and their part of the sum over all. What is not finite is no
// candidate: NaN has no place in an order.
void Session::offer(Member& member, size_t token, const float* logits, size_t count,
                    size_t first_token) {
  if (!all_finite(logits, count)) {
    member.finite = false;
    return;
  }
  auto& [top, best, peak, sum] = member.found[token];
  for (size_t i = 0; i < count; ++i) {
    // Chunks taken from another thread may come out of order, hence the whole comparison.
    const Candidate found{logits[i], static_cast<int32_t>(first_token + i)};
    if (top.size() == asked_[token].top) {
      if (!(found < top.front())) continue;
      std::pop_heap(top.begin(), top.end());
      top.pop_back();
    }
    top.push_back(found);
    std::push_heap(top.begin(), top.end());
  }
  const float highest = *std::max_element(logits, logits + count);
  if (highest > peak) {
    sum *= std::exp(peak - highest);
    peak = highest;
  }
  sum += kernels_.sum_exp(logits, count, peak);
}

void Session::run_head(unsigned m, Head head, float* logits) {
  const Step& step = program_.head();
  const size_t n = program_.hidden_size, index = program_.steps.size() - 1;
  const float* last = buffer(BufferId::residual) + (count_ - 1) * n;
  Member& member = members_[m];
  if (!step.w[0]) {
    write_output(m, head, logits);
    mark(m, step.counter);
    return;
  }
  const Matrix& w = *step.w[0];
  // A bias would have to be weighed against what screening leaves open. A penalty only lowers logits,
  // whose bounds hold, but it is for logits with their factor and cap.
  const bool plain = !step.bias[0] && !(penalizes_ && (step.scale != 1.0f || step.cap > 0));
  const bool screened = head == Head::greedy && w.kind == WeightKind::q8_split && plain;
  if (screened || w.kind != WeightKind::q8_split)
    member.plan.start(index);
  else
    member.plan.start_whole_head();
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  for (Found& found : member.found) {
    found.top.clear();
    found.best = {lowest, 0}, found.peak = lowest, found.sum = 0;
  }
  const PanelView input = head_rows_ == count_ ? normalized(m, step.norm, true)
                                               : normalized_row(m, step.norm, last);
  if (screened) {
    screen(m, input, step.norm);
  } else {
    multiply(m, w, input, [&](size_t t, size_t tokens, size_t b, size_t blocks, float* y) {
      const size_t first = b * kBlockRows, width = blocks * kBlockRows;
      const size_t live = std::min(width, w.rows - first);
      for (size_t i = 0; i < tokens; ++i) {
        float* row = y + i * width;
        const Asked asked = head == Head::greedy  ? Asked{nullptr, 0}
                            : head == Head::asked ? asked_[t + i]
                                                  : Asked{logits + (t + i) * w.rows, 0};
        // What a row's penalty asks for is no other row's: each gets the bits that it gets alone.
        const bool ranked = !asked.logits && !asked.top && !(penalized_[t + i].factor > 1);
        finish_logits(ranked, row, live, first);
        if (asked.logits) {
          member.finite &= all_finite(row, live);
          std::memcpy(asked.logits + first, row, live * sizeof(float));
        } else if (asked.top) {
          offer(member, t + i, row, live, first);
        } else {
          offer_best(member, t + i, row, live, first);
        }
      }
    });
  }
  mark(m, step.counter);
}

// What is left to do to products; where only the best is sought (`ranked`), that is the same without
// a factor or a cap.
void Session::finish_logits(bool ranked, float* logits, size_t count, size_t first_token) const {
  const Step& step = program_.head();
  for (size_t i = 0; step.bias[0] && i < count; ++i) logits[i] += step.bias[0][first_token + i];
  if (ranked) return;
  for (size_t i = 0; step.scale != 1.0f && i < count; ++i) logits[i] *= step.scale;
  if (step.cap > 0) kernels_.soft_cap(logits, count, step.cap);
}

// The normalized residual stream, of all tokens or the last.
void Session::write_output(unsigned m, Head head, float* output) {
  Member& member = members_[m];
  const Norm& norm = program_.head().norm;
  const size_t n = program_.hidden_size, first = head == Head::all_logits ? 0 : count_ - 1;
  const float* rows = buffer(BufferId::residual) + first * n;
  share(m, count_ - first, 1, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      if (norm.kind == NormKind::none)
        std::memcpy(output + t * n, rows + t * n, n * sizeof(float));
      else
        apply(norm, rows + t * n, n, output + t * n);
      member.finite &= all_finite(output + t * n, n);
    }
  });
}

// The greedy tokens of a split head. One token's activations are cheaper to quantize again in each
// thread than to share, and screening weighs the codes as they lie there.
void Session::screen(unsigned m, const PanelView& input, const Norm& norm) {
  const Matrix& w = *program_.head().w[0];
  Member& member = members_[m];
  const size_t groups = w.cols / kGroup;
  const float* rows = buffer(BufferId::residual) + (count_ - input.tokens) * w.cols;
  const auto alone = [&](size_t t) {
    return input.tokens == 1 ? input.tile(0) : normalized_row(m, norm, rows + t * w.cols).tile(0);
  };
  for (size_t first = 0; first < input.tokens; first += tile_size(input.tokens - first)) {
    const size_t tokens = tile_size(input.tokens - first);
    for (size_t i = 0; i < tokens; ++i) {
      const ActivationTile tile = alone(first + i);
      for (size_t g = 0; g < groups; ++g) {
        int sum = 0, squares = 0;
        for (size_t k = 0; k < kGroup; ++k) {
          const int code = tile.codes[g * kGroup + k];
          sum += code, squares += code * code;
        }
        // The zero point that makes up for the low nibbles' mean.
        member.corrections[first * groups + g * tokens + i] = static_cast<int32_t>(
            std::lrint(static_cast<float>(sum) * (kMeanNibble / 16.0f - 8.0f)));
        member.energies[(first + i) * groups + g] =
            tile.scales[g] * tile.scales[g] * static_cast<float>(squares);
      }
    }
  }
  share_weights(m, w.blocks(), w.read_bytes(),
                [&](size_t begin, size_t end) { screen_blocks(m, input, begin, end); });
  for (size_t t = 0; t < input.tokens; ++t) settle(m, t, alone(t));
}

// The logits of these blocks by the high nibbles and the highest of each, NaN where one of them is
// not finite; and spreads_, the largest scale of each block and group, which stays the same.
void Session::screen_blocks(unsigned m, const PanelView& input, size_t begin, size_t end) {
  const Matrix& w = *program_.head().w[0];
  const BlockLayout layout = block_layout(w.kind, w.cols);
  const MatmulFunction matmul = kernels_.matmul[kernel_of(WeightKind::q4_sym)];
  const size_t groups = w.cols / kGroup, width = w.blocks() * kBlockRows;
  // As in a product: two blocks stay in the first-level cache while several tiles pass.
  const size_t step = tile_size(input.tokens) == input.tokens ? kScratchBlocks : 2;
  for (size_t b = begin; b < end; b += step) {
    const size_t last = std::min(b + step, end);
    for (size_t t = 0; t < input.tokens;) {
      ActivationTile tile = input.tile(t);
      tile.corrections = &members_[m].corrections[t * groups];
      if (t == 0) tile.ahead = &members_[m].plan.ahead;
      float* high = &screened_[t * width + b * kBlockRows];
      matmul(w.from(b), last - b, w.cols, tile, high, width);
      for (size_t i = 0; i < tile.tokens; ++i) {
        float* highest = &highest_[(t + i) * w.blocks()];
        kernels_.highest(high + i * width, last - b, highest + b);
        for (size_t k = b; k < last; ++k) highest[k] *= 16.0f;
      }
      t += tile.tokens;
    }
    for (size_t k = b; k < last; ++k) {
      uint16_t* spreads = &spreads_[k / kBlockRows * kBlockRows * groups + k % kBlockRows];
      if (*spreads) continue;
      const auto* scales = reinterpret_cast<const uint16_t*>(w.from(k).data + layout.scales);
      for (size_t g = 0; g < groups; ++g)
        spreads[g * kBlockRows] = largest_half(scales + g * kBlockRows);
    }
  }
}

// The greedy token behind a token: the most promising block first, then whatever may still exceed
// what was found, or is not finite. A bound on the deviations of a block passes over most; what it
// leaves is judged row by row. Each thread does so for its own blocks, beside the most promising of
// all.
void Session::settle(unsigned m, size_t token, const ActivationTile& input) {
  const Matrix& w = *program_.head().w[0];
  const size_t parts = (w.blocks() + kBlockRows - 1) / kBlockRows;  // that share a bound
  const size_t begin = parts * m / threads() * kBlockRows;
  const size_t end = std::min(parts * (m + 1) / threads() * kBlockRows, w.blocks());
  if (begin >= end) return;
  const MatmulFunction matmul = kernels_.matmul[kernel_of(w.kind)];
  Member& member = members_[m];
  const auto compute = [&](size_t b) {
    float logits[kBlockRows];
    const Blocks block = model_.read(w, b, member.nibbles.data());
    matmul(block, 1, w.cols, input, logits, kBlockRows);
    const size_t first = b * kBlockRows;
    offer_best(member, token, logits, std::min<size_t>(kBlockRows, w.rows - first), first);
  };
  const size_t groups = w.cols / kGroup, scales_at = block_layout(w.kind, w.cols).scales;
  const float* energies = &member.energies[token * groups];
  const float* screened = &screened_[token * w.blocks() * kBlockRows];
  const float* highest = &highest_[token * w.blocks()];
  const auto deviations = [&](const void* scales, float (&out)[kBlockRows]) {
    kernels_.weigh_scales(static_cast<const uint16_t*>(scales), energies, groups, out);
    for (float& value : out) value = kDeviations * std::sqrt(kNibbleVariance * value);
  };
  alignas(64) float bounds[kBlockRows], own[kBlockRows];
  const auto may_exceed = [&](size_t b, float found) {
    deviations(w.from(b).data + scales_at, own);
    for (size_t r = 0; r < kBlockRows; ++r)
      if (!(16.0f * screened[b * kBlockRows + r] + own[r] < found)) return true;
    return false;
  };
  const size_t likely = static_cast<size_t>(
      std::max_element(highest, highest + w.blocks()) - highest);
  compute(likely);
  size_t open = 0;
  for (size_t b = begin; b < end && member.finite; ++b) {
    if (b % kBlockRows == 0) deviations(&spreads_[b * groups], bounds);
    const float bound = highest[b] + 1.001f * bounds[b % kBlockRows];  // for its rounding
    if (b != likely && !(bound < member.found[token].best.logit)) member.open[open++] = b;
  }
  for (size_t i = 0; i < open && member.finite; ++i) {
    // Scales lie apart: those of a later block are asked for.
    if (i + kOpenAhead < open)
      for (size_t at = 0; at < groups * kBlockRows * sizeof(uint16_t); at += 64)
        __builtin_prefetch(w.from(member.open[i + kOpenAhead]).data + scales_at + at, 0, 2);
    const size_t b = member.open[i];
    if (may_exceed(b, member.found[token].best.logit)) compute(b);
  }
}

}  // namespace pocketslm
