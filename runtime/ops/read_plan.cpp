#include "read_plan.h"

#include <algorithm>

namespace pocketslm {

void ReadPlan::build(const ModelFile& model, const ThreadPool& pool, unsigned member) {
  spans_.clear();
  phases_.clear();
  pass_lines_ = 0;
  const auto span = [](const Matrix& w, size_t begin, size_t end, size_t block_bytes) {
    return ReadSpan{w.data + begin * w.block_bytes, (end - begin) * block_bytes / 64};
  };
  const auto start = [&] { phases_.emplace_back(spans_.size(), pass_lines_); };
  const auto add = [&](const ReadSpan& added) {
    if (!added.lines) return;
    spans_.push_back(added);
    pass_lines_ += added.lines;
  };
  const auto read = [&](const Matrix& w, size_t begin, size_t end) {
    if (begin < end) add(span(w, begin, end, w.block_bytes));
  };
  const auto read_share = [&](const Matrix& w) {
    start();
    const auto [begin, end] = pool.share_of(member, w.blocks());
    read(w, begin, end);
  };
  const Matrix& head = model.head.data ? model.head : model.embedding;
  const auto [head_begin, head_end] = pool.share_of(member, head.blocks());
  spans_.push_back(span(head, head_begin, head_end, head.block_bytes));
  for (const Layer& layer : model.layers) {
    start();
    const Matrix* inputs[] = {&layer.query, &layer.key, &layer.value};
    size_t first = 0;
    const auto [begin, end] =
        pool.share_of(member, layer.query.blocks() + layer.key.blocks() + layer.value.blocks());
    for (const Matrix* w : inputs) {
      const size_t last = first + w->blocks();
      read(*w, std::clamp(begin, first, last) - first, std::clamp(end, first, last) - first);
      first = last;
    }
    read_share(layer.output);
    start();
    const auto [first_unit, last_unit] =
        pool.share_of(member, layer.intermediate_size / kGroup);
    for (size_t unit = first_unit; unit < last_unit; ++unit) {
      read(layer.gate, 2 * unit, 2 * unit + 2);
      read(layer.up, 2 * unit, 2 * unit + 2);
    }
    read_share(layer.down);
  }
  start();
  if (head.kind == WeightKind::q8_split) {
    const size_t bytes = block_layout(WeightKind::q4_sym, head.cols).bytes;
    for (size_t b = head_begin; b < head_end; ++b) add(span(head, b, b + 1, bytes));
  } else {
    read(head, head_begin, head_end);
  }
  if (spans_.size() == 1) spans_.push_back({head.data, 1});  // a ring is never empty
  base_ = 0;
  pass_end_ = pass_lines_;
  const ReadSpan* ring = spans_.data() + 1;
  ahead = {ring, spans_.data() + spans_.size(), ring, ring->data, ring->lines, 0, 0};
}

void ReadPlan::seek(const ReadSpan& span, uint64_t now) {
  ahead.span = &span, ahead.line = span.data, ahead.left = span.lines;
  ahead.asked = now;
}

void ReadPlan::start(size_t phase) {
  const auto [index, before] = phases_[phase];
  const uint64_t now = base_ + before;
  if (ahead.asked < now) seek(spans_[std::min(index, spans_.size() - 1)], now);
  ahead.used = now;
  pass_end_ = base_ + pass_lines_;
}

void ReadPlan::start_whole_head() {
  const uint64_t now = base_ + phases_.back().second;
  seek(spans_[0], now);
  ahead.used = now;
  pass_end_ = now + spans_[0].lines;
}

}  // namespace pocketslm
