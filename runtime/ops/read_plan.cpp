#include "read_plan.h"

#include <algorithm>

namespace pocketslm {

void ReadPlan::build(const Program& program, const ThreadPool& pool, unsigned member) {
  spans_.clear();
  steps_.clear();
  pass_lines_ = 0;
  const auto span = [](const Matrix& w, size_t begin, size_t end, size_t block_bytes) {
    return ReadSpan{w.from(begin).data, (end - begin) * block_bytes / 64};
  };
  const auto start = [&] { steps_.emplace_back(spans_.size(), pass_lines_); };
  const auto add = [&](const ReadSpan& added) {
    if (!added.lines) return;
    spans_.push_back(added);
    pass_lines_ += added.lines;
  };
  const auto read = [&](const Matrix& w, size_t begin, size_t end) {
    if (begin < end) add(span(w, begin, end, w.first.stride));
  };
  const auto read_share = [&](const Matrix& w) {
    const auto [begin, end] = pool.share_of(member, w.blocks());
    read(w, begin, end);
  };
  const auto read_project = [&](const Step& step) {
    size_t total = 0, first = 0;
    for (const Matrix* w : step.w) total += w ? w->blocks() : 0;
    const auto [begin, end] = pool.share_of(member, total);
    for (const Matrix* w : step.w) {
      if (!w) break;
      const size_t last = first + w->blocks();
      read(*w, std::clamp(begin, first, last) - first, std::clamp(end, first, last) - first);
      first = last;
    }
  };
  const auto read_gated = [&](const Step& step) {
    const auto [first, last] = pool.share_of(member, step.width / kGroup);
    const size_t together = gated_units(pool.size());
    for (size_t unit = first; unit < last; unit += together)
      for (const Matrix* w : {step.w[0], step.w[1]})
        if (w) read(*w, 2 * unit, 2 * std::min(unit + together, last));
  };
  const auto read_head = [&](const Matrix& w) {
    const auto [begin, end] = pool.share_of(member, w.blocks());
    spans_.front() = span(w, begin, end, w.first.stride);
    if (w.kind != WeightKind::q8_split || w.apart()) return read(w, begin, end);
    for (size_t b = begin; b < end; ++b) add(span(w, b, b + 1, w.read_bytes()));
  };
  const uint8_t* embedding = program.embed().w[0]->data();
  spans_.push_back({embedding, 0});  // where there is no head to read
  for (const Step& step : program.steps) {
    start();
    switch (step.code) {
      case Code::project: read_project(step); break;
      case Code::project_add: read_share(*step.w[0]); break;
      case Code::gated: read_gated(step); break;
      case Code::head:
        if (step.w[0]) read_head(*step.w[0]);
        break;
      default: break;
    }
  }
  if (spans_.size() == 1) spans_.push_back({embedding, 1});  // a ring is never empty
  base_ = 0;
  pass_end_ = pass_lines_;
  const ReadSpan* ring = spans_.data() + 1;
  ahead = {ring, spans_.data() + spans_.size(), {}, {}, 0};
  seek(*ring, 0);
}

void ReadPlan::seek(const ReadSpan& span, uint64_t now) {
  ahead.asked = ahead.touched = {&span, span.data, span.lines, now};
}

void ReadPlan::start(size_t step) {
  const auto [index, before] = steps_[step];
  const uint64_t now = base_ + before;
  if (ahead.asked.lines < now) seek(spans_[std::min(index, spans_.size() - 1)], now);
  ahead.used = now;
  pass_end_ = base_ + pass_lines_;
}

void ReadPlan::start_whole_head() {
  const uint64_t now = base_ + steps_.back().second;
  seek(spans_[0], now);
  ahead.used = now;
  pass_end_ = now + spans_[0].lines;
}

}  // namespace pocketslm
