#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "weight_values.h"

namespace pocketslm {
namespace {

// One row of a packed matrix, whose block is given, for the embedding.
void dequantize_row(const Matrix& w, const Blocks& blocks, size_t row, float* out) {
  const Form form = form_of(w.kind);
  const BlockParts block = parts_of(blocks, block_layout(w.kind, w.cols));
  const size_t r = row % kBlockRows;
  for (size_t k = 0; k < w.cols; ++k) {
    if (w.kind == WeightKind::f32) {
      out[k] = reinterpret_cast<const float*>(block.codes)[k * kBlockRows + r];
    } else if (w.kind == WeightKind::f16) {
      out[k] = half_to_float(reinterpret_cast<const uint16_t*>(block.codes)[k * kBlockRows + r]);
    } else {
      const auto [scale, minimum] = scale_at(form, block, r, k);
      out[k] = scale * static_cast<float>(value_at(form, block, r, k)) + minimum;
    }
  }
}

}  // namespace

Session::Session(const ModelFile& model, const Kernels& kernels, size_t context,
                 pslm_kv_type kv_type, unsigned threads, bool pin, size_t slots)
    : model_(model),
      program_(model.program),
      kernels_(kernels),
      batch_(std::min(program_.bidirectional ? kMaxWhole : kBatch, context * slots)),
      context_(kv_type == PSLM_KV_CALLER ? 0 : context),
      members_(threads),
      pool_(threads, pin) {
  const size_t beside_window = std::max(batch_, kTakenBack);
  for (size_t i = 0; i < slots; ++i)
    contexts_.push_back({States(program_, kernels, context, kv_type, beside_window)});
  use_slot(0);
  const size_t hidden_size = program_.hidden_size;
  row_updates_.resize(batch_);
  for (const Rotary& rotary : program_.rotaries) {
    cosines_.emplace_back(batch_ * rotary.half);
    sines_.emplace_back(batch_ * rotary.half);
  }
  const size_t widest_input = std::max(hidden_size, program_.width(BufferId::attended));
  const size_t hidden_width = program_.width(BufferId::hidden);
  size_t bytes[kParts];
  for (size_t i = 0; i < kBuffers; ++i) bytes[i] = batch_ * program_.widths[i] * sizeof(float);
  bytes[kNormed] = bytes[kProjected] = batch_ * hidden_size * sizeof(float);
  bytes[kPanel] = Panel::bytes(batch_, widest_input);
  bytes[kHiddenPanel] = Panel::bytes(batch_, hidden_width);
  places_ = places_of(program_, bytes);
  work_memory_ = Buffer<uint8_t>(places_.bytes);
  panel_ = Panel(work_memory_.data() + places_.at[kPanel], batch_, widest_input);
  hidden_panel_ = Panel(work_memory_.data() + places_.at[kHiddenPanel], batch_, hidden_width);
  // A caller's memory may hold as much as the model reads.
  const size_t most = kv_type == PSLM_KV_CALLER ? model.config.max_context : context;
  size_t pieces = 0;
  for (const Step& step : program_.steps)
    if (step.code == Code::attend)
      pieces = std::max(pieces, kFewTokens * step.heads * (most_pieces(step, most) + 1));
  piece_out_ = Buffer<float>(pieces * program_.widest_head_dim);
  piece_maximum_ = Buffer<float>(pieces);
  piece_weight_ = Buffer<float>(pieces);
  for (Member& member : members_) {
    member.normed = Buffer<float>(kMaxTile * program_.widest());
    member.panel = Panel(kMaxTile, program_.widest());
    member.normed_row = Buffer<float>(hidden_size);
    member.row_panel = Panel(1, hidden_size);
    member.outputs = Buffer<float>(2 * kMaxTile * kScratchBlocks * kBlockRows);
    member.queries = Buffer<float>(kMaxQueryRows * program_.widest_head_dim);
    member.attended = Buffer<float>(kMaxQueryRows * program_.widest_head_dim);
  }
  for (unsigned m = 0; m < threads; ++m) members_[m].plan.build(program_, pool_, m);
  work_.resize(threads);
  size_t nibbles = 0;
  for (const Matrix* w : {program_.embed().w[0], program_.embed().w[1], program_.head().w[0]})
    if (w) nibbles = std::max(nibbles, w->first.low_stride);
  for (Member& member : members_) member.nibbles = Buffer<uint8_t>(nibbles);
  if (const Matrix* head = program_.head().w[0]; head && head->kind == WeightKind::q8_split) {
    highest_ = Buffer<float>(kMaxTile * head->blocks());
    screened_ = Buffer<float>(kMaxTile * head->blocks() * kBlockRows);
    spreads_ = Buffer<uint16_t>(round_up(head->blocks(), kBlockRows) * (head->cols / kGroup));
    for (Member& member : members_) {
      member.corrections.resize(kMaxTile * hidden_size / kGroup);
      member.energies.resize(kMaxTile * hidden_size / kGroup);
      member.open.resize(head->blocks());
    }
  }
}

void Session::bind_cache(void* const* places, size_t positions, size_t length) {
  used_->states.bind(places, positions);
  context_ = context_of(positions);
  used_->length = length;
}

void Session::Context::truncate(size_t to) {
  if (!to) states.forget();
  length = to;
}

Session::Lengths Session::lengths() const {
  Lengths lengths{};
  for (size_t i = 0; i < slots(); ++i) lengths[i] = contexts_[i].length;
  return lengths;
}

void Session::rewind(const Lengths& lengths) {
  for (size_t i = 0; i < slots(); ++i)
    contexts_[i].truncate(contexts_[i].can_rewind(lengths[i]) ? lengths[i] : 0);
}

void Session::restore(size_t count, const uint8_t* in) {
  used_->states.restore(count, in);
  used_->length = count;
}

void Session::forward(const int32_t* tokens, size_t count, pslm_logits which, float* logits) {
  trust_logits();
  for (size_t done = 0; done < count;) {
    const size_t part = std::min(batch_, count - done);
    Head head = Head::none;
    if (which == PSLM_LOGITS_ALL) head = Head::all_logits;
    if (which == PSLM_LOGITS_LAST && done + part == count) head = Head::last_logits;
    head_rows_ = which == PSLM_LOGITS_ALL ? part : 1;
    run(tokens + done, part, head, logits);
    if (which == PSLM_LOGITS_ALL) logits += part * model_.output_size();
    done += part;
  }
}

// Tokens of the context in use.
void Session::run(const int32_t* tokens, size_t count, Head head, float* logits) {
  runs_.assign(1, {used_, 0, count});
  begin(tokens, count);
  auto region = [&](unsigned m) {
    run_layers(m);
    if (head != Head::none) run_head(m, head, logits);
    members_[m].plan.finish();
  };
  pool_.run(region);
  end();
}

void Session::begin(const int32_t* tokens, size_t count) {
  count_ = count;
  of_hidden_ = false;
  for (const Run& run : runs_) {
    const Updates& updates = adapters_[run.context->adapter];
    std::fill_n(&row_updates_[run.first], run.count, &updates);
    of_hidden_ |= updates.of_hidden;
  }
  clock_.start(count);
  if (few()) {
    embed(0, tokens, 0, count);
  } else {
    auto rows = [&](unsigned m) {
      share(m, count, kMaxTile, [&](size_t begin, size_t end) { embed(m, tokens, begin, end); });
    };
    pool_.run(rows);
  }
  clock_.mark(program_.embed().counter);
}

void Session::run_layers(unsigned m) {
  for (size_t i = 1; i + 1 < program_.steps.size(); ++i) run_step(m, i);
}

// The tokens of the batch belong to their contexts.
void Session::end() {
  for (const Run& run : runs_) {
    run.context->length += run.count;
    run.context->states.advance(run.context->length);
    if (program_.bidirectional) run.context->truncate(0);
  }
  if (count_ == 1) balance();
}

void Session::run_step(unsigned m, size_t index) {
  const Step& step = program_.steps[index];
  members_[m].plan.start(index);
  const Step& next = program_.steps[index + 1];  // the head is the last one
  if (kTouchesPages && few() && next.code == Code::attend) expect_stores(m, next);
  switch (step.code) {
    case Code::norm: normalize_buffer(m, step); break;
    case Code::project: project(m, step, index); break;
    case Code::attend: attend(m, step); break;
    case Code::project_add: add_projection(m, step, index); break;
    case Code::gated: gated(m, step, index); break;
    case Code::short_conv: short_conv(m, step); break;
    case Code::embed:
    case Code::head: break;  // not among the steps in between
  }
  mark(m, step.counter);
}

// Decoding is bound by memory, which cores share unevenly: each gets the part that it can read in
// the same time.
void Session::balance() {
  for (unsigned m = 0; m < threads(); ++m) work_[m] = members_[m].read_bytes;
  if (pool_.balance(work_))
    for (unsigned m = 0; m < threads(); ++m) members_[m].plan.build(program_, pool_, m);
  for (Member& member : members_) member.read_bytes = 0;
}

void Session::embed_row(unsigned m, const Matrix& w, size_t row, float* out) {
  dequantize_row(w, model_.read(w, row / kBlockRows, members_[m].nibbles.data()), row, out);
}

// The residual stream of a batch's rows at first, and their rotation.
void Session::embed(unsigned m, const int32_t* tokens, size_t begin, size_t end) {
  const Step& step = program_.embed();
  const size_t n = program_.hidden_size;
  const Run* run = runs_.data();
  for (size_t t = begin; t < end; ++t) {
    while (t >= run->last()) ++run;
    rotation(run->position(t), t);
    float* row = buffer(BufferId::residual) + t * n;
    embed_row(m, *step.w[0], static_cast<size_t>(tokens[t]), row);
    if (step.scale != 1.0f)
      for (size_t i = 0; i < n; ++i) row[i] *= step.scale;
    if (!step.w[1]) continue;
    float* position = members_[m].normed.data();
    embed_row(m, *step.w[1], run->position(t), position);
    for (size_t i = 0; i < n; ++i) row[i] += position[i];
  }
}

void Session::rotation(size_t position, size_t row) {
  for (size_t r = 0; r < program_.rotaries.size(); ++r) {
    const auto& [frequencies, half, factor] = program_.rotaries[r];
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * static_cast<double>(frequencies[i]);
      cosines_[r][row * half + i] = static_cast<float>(std::cos(angle)) * factor;
      sines_[r][row * half + i] = static_cast<float>(std::sin(angle)) * factor;
    }
  }
}

void Session::apply(const Norm& norm, const float* x, size_t n, float* out) const {
  if (norm.kind == NormKind::rms) kernels_.rms_norm(x, norm.weight, n, norm.eps, out);
  if (norm.kind == NormKind::layer)
    kernels_.layer_norm(x, norm.weight, norm.bias, n, norm.eps, out);
}

// The rows of `width` in quantized form. Each is had from prepare(token), which need not leave it in
// `rows` if nobody reads it as floats. A few tokens are for each thread to make ready for itself; a
// batch is shared out by tiles.
template <typename Prepare>
PanelView Session::quantized(unsigned m, Panel& panel, const float* rows, size_t width,
                             Prepare&& prepare) {
  const PanelView view{few() ? &members_[m].panel : &panel, count_, width, rows};
  const auto fill = [&](size_t begin, size_t end) {
    for (size_t t = begin * kMaxTile; t < std::min(end * kMaxTile, count_);) {
      const size_t tile = tile_size(count_ - t);
      for (size_t i = 0; i < tile; ++i)
        kernels_.quantize(prepare(t + i), width / kGroup, view.row(t, i, 0));
      t += tile;
    }
  };
  few() ? fill(0, 1) : share(m, (count_ + kMaxTile - 1) / kMaxTile, 1, fill);
  return view;
}

// Normalization and quantization of one row of the residual stream, by each thread for itself.
PanelView Session::normalized_row(unsigned m, const Norm& norm, const float* x) {
  const size_t n = program_.hidden_size;
  Member& member = members_[m];
  const float* row = norm.kind == NormKind::none ? x : member.normed_row.data();
  apply(norm, x, n, member.normed_row.data());
  const PanelView view{&member.row_panel, 1, n, row};
  kernels_.quantize(row, n / kGroup, view.row(0, 0, 0));
  return view;
}

// The same for all of it.
PanelView Session::normalized(unsigned m, const Norm& norm, bool want_floats) {
  const size_t n = program_.hidden_size;
  const float* x = buffer(BufferId::residual);
  float* normed = few() ? members_[m].normed.data() : floats(kNormed);
  const float* rows = norm.kind == NormKind::none ? x : normed;
  const bool keeps = want_floats || widest_;  // adapters read them
  return quantized(m, panel_, rows, n, [&](size_t t) {
    if (rows == x) return x + t * n;
    float* row = keeps ? normed + t * n : members_[m].normed_row.data();
    apply(norm, x + t * n, n, row);
    return static_cast<const float*>(row);
  });
}

// A buffer in place, group by group.
void Session::normalize_buffer(unsigned m, const Step& step) {
  const size_t groups = step.width / step.group, total = count_ * groups;
  float* values = buffer(step.buffer);
  share(m, total, (total + 4 * threads() - 1) / (4 * threads()), [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      float* group = values + i * step.group;
      apply(step.norm, group, step.group, group);
    }
  });
}

void Session::set_updates(size_t adapter, std::vector<StepUpdates> steps) {
  size_t widest = widest_;
  bool of_hidden = false;
  for (size_t i = 0; i < steps.size(); ++i) {
    widest = std::max(widest, steps[i].width());
    const Step& step = program_.steps[i];
    of_hidden |= step.code == Code::project_add && step.buffer == BufferId::hidden &&
                 steps[i].of[0].rank;
  }
  lowered_.resize(widest * batch_);
  for (Member& member : members_) member.lowered.resize(widest);
  widest_ = widest;
  Updates updates{std::move(steps), of_hidden, {}};
  updates.gather();
  adapters_[adapter] = std::move(updates);
  for (Context& context : contexts_)
    if (context.adapter == adapter) context.truncate(0);
}

void Session::use_adapter(size_t adapter) {
  if (used_->adapter == adapter) return;
  used_->adapter = adapter;
  used_->truncate(0);
}

// What each row's updates make of the input that they read: [row][update][rank], ranks in whole
// panels; null where no row has any.
// One token is cheaper to do again in each thread than to share.
const float* Session::lower(unsigned m, size_t index, const PanelView& panel) {
  const auto updated = [&](const Run& run) {
    const Updates& updates = adapters_[run.context->adapter];
    return !updates.steps.empty() && updates.steps[index].width() > 0;
  };
  if (std::none_of(runs_.begin(), runs_.end(), updated)) return nullptr;
  float* out = count_ == 1 ? members_[m].lowered.data() : lowered_.data();
  const auto fill = [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      if (row_updates_[t]->steps.empty()) continue;
      float* low = out + t * widest_;
      for (const LowRank& update : row_updates_[t]->steps[index].of) {
        if (update.rank) update.lower(kernels_, panel.values(t), low);
        low += update.width();
      }
    }
  };
  count_ == 1 ? fill(0, 1) : share(m, count_, few() ? 1 : kMaxTile, fill);
  return out;
}

void Session::project(unsigned m, const Step& step, size_t index) {
  const PanelView input = normalized(m, step.norm, step.reads_floats);
  float* const outputs[] = {buffer(BufferId::query), buffer(BufferId::key),
                            buffer(BufferId::value)};
  const float* low = lower(m, index, input);
  size_t total = 0;
  for (const Matrix* w : step.w) total += w ? w->blocks() : 0;
  share_weights(m, total, step.w[0]->block_bytes, [&](size_t begin, size_t end) {
    size_t first = 0;
    for (size_t part = 0; part < 3 && step.w[part]; ++part) {
      const Matrix& w = *step.w[part];
      const float* bias = step.bias[part];
      const size_t last = first + w.blocks();
      const size_t from = std::max(begin, first), to = std::min(end, last);
      if (from < to)
        multiply_blocks(
            m, w, input, from - first, to - first,
            [&](size_t t, size_t tokens, size_t b, size_t blocks, const float* y) {
              const size_t width = blocks * kBlockRows;
              for (size_t i = 0; i < tokens; ++i) {
                float* out = outputs[part] + (t + i) * w.rows + b * kBlockRows;
                std::memcpy(out, y + i * width, width * sizeof(float));
                for (size_t j = 0; bias && j < width; ++j) out[j] += bias[b * kBlockRows + j];
                if (low) add_update(low, t + i, index, part, b * kBlockRows, width, out);
              }
            });
      first = last;
    }
  });
}

// The quantized form of attended or hidden.
PanelView Session::product_input(unsigned m, const Step& step) {
  const size_t width = step.w[0]->cols;
  const float* rows = buffer(step.buffer);
  const auto in_place = [&](size_t t) { return rows + t * width; };
  if (step.buffer == BufferId::hidden) {
    if (step.source != kNone) return {&hidden_panel_, count_, width, rows};
    return quantized(m, hidden_panel_, rows, width, in_place);
  }
  if (count_ > 1 || step.source == kNone) return quantized(m, panel_, rows, width, in_place);
  const Step& source = program_.steps[step.source];
  float* joined = members_[m].normed.data();
  const size_t pieces = pieces_of(source, seen_by(source, runs_.front(), 0)).count;
  for (size_t head = 0; head < source.heads; ++head)
    join(source, pieces, head, joined + head * source.head_dim);
  return quantized(m, panel_, joined, width, [&](size_t) { return joined; });
}

// residual += scale * norm(w * input + bias)
void Session::add_projection(unsigned m, const Step& step, size_t index) {
  const Matrix& w = *step.w[0];
  const float* bias = step.bias[0];
  const PanelView input = product_input(m, step);
  const float* low = lower(m, index, input);
  float* residual = buffer(BufferId::residual);
  const bool normed = step.norm.kind != NormKind::none;
  if (!normed && !bias && step.scale == 1.0f) {
    multiply(m, w, input, [&](size_t t, size_t tokens, size_t b, size_t blocks, const float* y) {
      const size_t width = blocks * kBlockRows;
      for (size_t i = 0; i < tokens; ++i) {
        float* x = residual + (t + i) * w.rows + b * kBlockRows;
        for (size_t j = 0; j < width; ++j) x[j] += y[i * width + j];
        if (low) add_update(low, t + i, index, 0, b * kBlockRows, width, x);
      }
    });
    return;
  }
  multiply(m, w, input, [&](size_t t, size_t tokens, size_t b, size_t blocks, float* y) {
    const size_t width = blocks * kBlockRows, first = b * kBlockRows;
    for (size_t i = 0; i < tokens; ++i) {
      float* row = y + i * width;
      for (size_t j = 0; bias && j < width; ++j) row[j] += bias[first + j];
      if (low) add_update(low, t + i, index, 0, first, width, row);
      if (normed) {
        std::memcpy(floats(kProjected) + (t + i) * w.rows + first, row, width * sizeof(float));
        continue;
      }
      float* x = residual + (t + i) * w.rows + first;
      for (size_t j = 0; j < width; ++j) x[j] += step.scale * row[j];
    }
  });
  if (!normed) return;
  share(m, count_, 1, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      float* row = floats(kProjected) + t * w.rows;
      apply(step.norm, row, w.rows, row);
      for (size_t j = 0; j < w.rows; ++j) residual[t * w.rows + j] += step.scale * row[j];
    }
  });
}

void Session::gated(unsigned m, const Step& step, size_t index) {
  const PanelView input = normalized(m, step.norm, step.reads_floats);
  const PanelView hidden{&hidden_panel_, count_, step.width, buffer(BufferId::hidden)};
  const bool want_floats = step.keeps_floats || of_hidden_;
  const float* low = lower(m, index, input);
  const bool has_gate = step.w[0];
  size_t unit_bytes = 0;
  for (const Matrix* w : {step.w[0], step.w[1]}) unit_bytes += w ? 2 * w->block_bytes : 0;
  const size_t activation = static_cast<size_t>(step.activation);
  share_weights(m, step.width / kGroup, unit_bytes, [&](size_t begin, size_t end) {
    Member& member = members_[m];
    float* gate = member.outputs.data();
    float* up = gate + kMaxTile * kScratchBlocks * kBlockRows;
    // In the order of the plan, but where a batch's tiles pass: then weights stay in the first cache.
    const size_t together = count_ <= kMaxTile ? gated_units(threads()) : 1;
    for (size_t unit = begin, units; unit < end; unit += units) {
      units = std::min(together, end - unit);
      const size_t width = units * kGroup;
      for (size_t t = 0; t < count_;) {
        ActivationTile tile = input.tile(t);
        if (t == 0) tile.ahead = &member.plan.ahead;
        float* out = gate;
        for (size_t k = has_gate ? 0 : 1; k < 2; ++k, out = up) {
          const Matrix& w = *step.w[k];
          if (!has_gate) out = up;
          kernels_.matmul[kernel_of(w.kind)](w.from(unit * 2), 2 * units, w.cols, tile, out, width);
          if (const float* bias = step.bias[k])
            for (size_t i = 0; i < tile.tokens * width; ++i)
              out[i] += bias[unit * kGroup + i % width];
        }
        for (size_t i = 0; low && i < tile.tokens; ++i) {
          if (has_gate)
            add_update(low, t + i, index, 0, unit * kGroup, width, gate + i * width);
          add_update(low, t + i, index, 1, unit * kGroup, width, up + i * width);
        }
        if (has_gate)
          kernels_.gated[activation](gate, up, tile.tokens * width, gate);
        else
          kernels_.activate[activation](up, tile.tokens * width, gate);
        for (size_t i = 0; i < tile.tokens; ++i) {
          const float* row = gate + i * width;
          kernels_.quantize(row, units, hidden.row(t, i, unit));
          if (want_floats)
            std::memcpy(buffer(BufferId::hidden) + (t + i) * step.width + unit * kGroup, row,
                        width * sizeof(float));
        }
        t += tile.tokens;
      }
    }
  });
}

// Channels are shared out; each goes through the tokens of a context in order.
void Session::short_conv(unsigned m, const Step& step) {
  const size_t width = step.width, taps = step.tap_count, kept = taps - 1;
  const auto run_channels = [&](const Run& run, size_t from, size_t to) {
    float* b = buffer(BufferId::query) + run.first * width;
    const float* c = buffer(BufferId::key) + run.first * width;
    const float* x = buffer(BufferId::value) + run.first * width;
    float* out = buffer(BufferId::attended) + run.first * width;
    float* columns = run.context->states.columns(step.state);
    for (size_t k = 0; run.context->length == 0 && k < kept; ++k)
      std::fill(columns + k * width + from, columns + k * width + to, 0.0f);
    for (size_t t = 0; t < run.count; ++t)
      for (size_t i = from; i < to; ++i) b[t * width + i] *= x[t * width + i];
    // The products of this token and the ones before it, the oldest first.
    const auto row = [&](size_t t, size_t k) {
      const size_t at = t + k;  // counted from the oldest column that is kept
      return at < kept ? columns + at * width : b + (at - kept) * width;
    };
    for (size_t t = 0; t < run.count; ++t) {
      float* y = out + t * width;
      for (size_t i = from; i < to; ++i) y[i] = step.bias[0] ? step.bias[0][i] : 0.0f;
      for (size_t k = 0; k < taps; ++k) {
        const float* product = row(t, k);
        for (size_t i = from; i < to; ++i) y[i] += step.taps[i * taps + k] * product[i];
      }
      for (size_t i = from; i < to; ++i) y[i] *= c[t * width + i];
    }
    for (size_t k = 0; k < kept; ++k) {
      const float* product = row(run.count, k);
      std::copy(product + from, product + to, columns + k * width + from);
    }
  };
  share(m, width / kGroup, 1, [&](size_t begin, size_t end) {
    for (const Run& run : runs_) run_channels(run, begin * kGroup, end * kGroup);
  });
}

}  // namespace pocketslm
