#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "half.h"

namespace pocketslm {
namespace {

constexpr size_t kMaxSpans = 64;
constexpr size_t kChunkBytes = 16384;

// Lines that a thread asks for between two looks at whether it still has to wait.
constexpr size_t kIdleLines = 4;

size_t widest(const ModelFile& m) {
  return std::max({size_t{m.config.hidden_size}, m.query_width(),
                   size_t{m.config.intermediate_size}});
}

// One row of a packed matrix, for the embedding.
void dequantize_row(const Matrix& w, size_t row, float* out) {
  const BlockLayout layout = block_layout(w.kind, w.cols);
  const uint8_t* block = w.data + row / kBlockRows * w.block_bytes;
  const size_t r = row % kBlockRows;
  for (size_t k = 0; k < w.cols; ++k) {
    if (w.kind == WeightKind::f32) {
      out[k] = reinterpret_cast<const float*>(block)[k * kBlockRows + r];
      continue;
    }
    if (w.kind == WeightKind::f16) {
      out[k] = half_to_float(reinterpret_cast<const uint16_t*>(block)[k * kBlockRows + r]);
      continue;
    }
    const size_t entry = k / kGroup * kBlockRows + r;
    int code;
    if (code_bits(w.kind) == 8) {
      code = block[k / 4 * 64 + r * 4 + k % 4];
    } else {
      const uint8_t byte = block[k / 8 * 64 + r * 4 + k % 4];
      code = k / 4 % 2 ? byte >> 4 : byte & 15;
    }
    const float scale =
        half_to_float(reinterpret_cast<const uint16_t*>(block + layout.scales)[entry]);
    const uint8_t* offsets = block + layout.offsets;
    switch (offset_of(w.kind)) {
      case Offset::none:
        out[k] = scale * static_cast<float>(code - (1 << (code_bits(w.kind) - 1)));
        break;
      case Offset::zero_point:
        out[k] = scale * static_cast<float>(code - offsets[entry]);
        break;
      case Offset::minimum:
        out[k] = scale * static_cast<float>(code) +
                 half_to_float(reinterpret_cast<const uint16_t*>(offsets)[entry]);
    }
  }
}

}  // namespace

Session::Session(const ModelFile& model, const Kernels& kernels, size_t context,
                 pslm_kv_type kv_type, unsigned threads, bool pin)
    : model_(model),
      kernels_(kernels),
      context_(kv_type == PSLM_KV_CALLER ? 0 : context),
      cache_(model, kernels, context, kv_type),
      members_(threads),
      pool_(threads, pin) {
  const FileHeader& c = model.config;
  const size_t batch = std::min(kBatch, context);
  x_ = Buffer<float>(batch * c.hidden_size);
  normed_ = Buffer<float>(batch * c.hidden_size);
  q_ = Buffer<float>(batch * model.query_width());
  k_ = Buffer<float>(batch * model.kv_width());
  v_ = Buffer<float>(batch * model.kv_width());
  attended_ = Buffer<float>(batch * model.query_width());
  hidden_ = Buffer<float>(batch * c.intermediate_size);
  cosines_ = Buffer<float>(batch * c.rope_dim / 2);
  sines_ = Buffer<float>(batch * c.rope_dim / 2);
  panel_ = Panel(batch, std::max(size_t{c.hidden_size}, model.query_width()));
  hidden_panel_ = Panel(batch, c.intermediate_size);
  piece_out_ = Buffer<float>(c.heads * kMaxSpans * c.head_dim);
  piece_maximum_ = Buffer<float>(c.heads * kMaxSpans);
  piece_weight_ = Buffer<float>(c.heads * kMaxSpans);
  for (Member& member : members_) {
    member.normed = Buffer<float>(widest(model));
    member.panel = Panel(1, widest(model));
    member.outputs = Buffer<float>(2 * kMaxTile * kScratchBlocks * kBlockRows);
    member.queries = Buffer<float>(kMaxQueryRows * c.head_dim);
    member.attended = Buffer<float>(kMaxQueryRows * c.head_dim);
  }
  for (unsigned m = 0; m < threads; ++m) plan_reading(m);
}

// The order in which a thread reads its share of the weights; shares are those of ThreadPool::share.
void Session::plan_reading(unsigned m) {
  Member& member = members_[m];
  uint64_t lines = 0;
  std::vector<std::pair<size_t, uint64_t>> phases;
  const auto start = [&] { phases.emplace_back(member.spans.size(), lines); };
  const auto read = [&](const Matrix& w, size_t begin, size_t end) {
    if (begin >= end) return;
    member.spans.push_back({w.data + begin * w.block_bytes, (end - begin) * w.block_bytes / 64});
    lines += member.spans.back().lines;
  };
  const auto share = [&](size_t total) {
    return std::make_pair(total * m / threads(), total * (m + 1) / threads());
  };
  const auto read_share = [&](const Matrix& w) {
    start();
    const auto [begin, end] = share(w.blocks());
    read(w, begin, end);
  };
  for (const Layer& layer : model_.layers) {
    start();
    const Matrix* inputs[] = {&layer.query, &layer.key, &layer.value};
    size_t first = 0;
    const auto [begin, end] =
        share(layer.query.blocks() + layer.key.blocks() + layer.value.blocks());
    for (const Matrix* w : inputs) {
      read(*w, std::max(begin, first) - first, std::min(end, first + w->blocks()) - first);
      first += w->blocks();
    }
    read_share(layer.output);
    start();
    const auto [first_unit, last_unit] = share(layer.intermediate_size / kGroup);
    for (size_t unit = first_unit; unit < last_unit; ++unit) {
      read(layer.gate, 2 * unit, 2 * unit + 2);
      read(layer.up, 2 * unit, 2 * unit + 2);
    }
    read_share(layer.down);
  }
  read_share(model_.head.data ? model_.head : model_.embedding);
  if (member.spans.empty()) member.spans.push_back({model_.embedding.data, 1});
  for (const auto& [index, before] : phases)
    member.phases.emplace_back(member.spans.data() + std::min(index, member.spans.size() - 1),
                               before);
  member.phases.emplace_back(member.spans.data(), lines);
  const ReadSpan* begin = member.spans.data();
  member.ahead = {begin, begin + member.spans.size(), begin, begin->data, begin->lines, 0, 0};
}

// Puts the reader where this phase needs it: work taken from other threads, or by them, and prompt
// batches leave it too far ahead or behind.
void Session::start_phase(unsigned m, size_t phase) {
  Member& member = members_[m];
  ReadAhead& ahead = member.ahead;
  const auto [span, before] = member.phases[phase];
  const uint64_t now = runs_ * member.phases.back().second + before;
  if (ahead.asked < now) {
    ahead.span = span, ahead.line = span->data, ahead.left = span->lines;
    ahead.asked = now;
  }
  ahead.used = now;
}

// Threads that wait use the time to read ahead.
void Session::barrier(unsigned m) {
  ReadAhead& ahead = members_[m].ahead;
  pool_.barrier([&] {
    if (ahead.asked < ahead.used + kMaxLeadLines) ask_lines(ahead, kIdleLines);
  });
}

template <typename F>
void Session::share(unsigned m, size_t total, size_t chunk, F&& f) {
  ReadAhead& ahead = members_[m].ahead;
  pool_.share(m, total, chunk, f, [&] {
    if (ahead.asked < ahead.used + kMaxLeadLines) ask_lines(ahead, kIdleLines);
  });
}

void Session::bind_cache(void* const* places, size_t positions) {
  cache_.bind(places, positions);
  context_ = std::min<size_t>(positions / kPositionBlock * kPositionBlock,
                              model_.config.max_context);
  length_ = 0;
}

void Session::forward(const int32_t* tokens, size_t count, pslm_logits which, float* logits) {
  for (size_t done = 0; done < count;) {
    const size_t part = std::min(kBatch, count - done);
    Head head = Head::none;
    if (which == PSLM_LOGITS_ALL) head = Head::all_logits;
    if (which == PSLM_LOGITS_LAST && done + part == count) head = Head::last_logits;
    run(tokens + done, part, head, logits);
    if (which == PSLM_LOGITS_ALL) logits += part * model_.config.vocab_size;
    done += part;
  }
}

int32_t Session::step_greedy(int32_t token) {
  run(&token, 1, Head::greedy, nullptr);
  const Member* best = &members_[0];
  for (const Member& member : members_)
    if (member.best_logit > best->best_logit ||
        (member.best_logit == best->best_logit && member.best_token < best->best_token))
      best = &member;
  return best->best_token;
}

void Session::run(const int32_t* tokens, size_t count, Head head, float* logits) {
  count_ = count;
  clock_.start(count);
  prepare_rotation(count);
  for (size_t t = 0; t < count; ++t)
    dequantize_row(model_.embedding, static_cast<size_t>(tokens[t]),
                   &x_[t * model_.config.hidden_size]);
  if (count == 1) {
    // Enough spans to keep every thread busy, few enough that joining them stays cheap.
    const size_t wanted = (length_ + 1) / (8 * pool_.size());
    span_ = round_up(std::max<size_t>(wanted, 64), kPositionBlock);
    span_ = std::max(span_, round_up((length_ + kMaxSpans) / kMaxSpans, kPositionBlock));
    spans_ = (length_ + span_) / span_;
  }
  clock_.mark(&pslm_times::embedding_ns);
  auto region = [&](unsigned m) {
    for (size_t i = 0; i < model_.layers.size(); ++i) layer(m, model_.layers[i], i);
    if (head != Head::none) run_head(m, head, logits);
  };
  pool_.run(region);
  ++runs_;
  length_ += count;
}

void Session::prepare_rotation(size_t count) {
  const size_t half = model_.config.rope_dim / 2;
  for (size_t t = 0; t < count; ++t)
    for (size_t i = 0; i < half; ++i) {
      const double angle =
          static_cast<double>(length_ + t) * static_cast<double>(model_.rope_frequencies[i]);
      cosines_[t * half + i] = static_cast<float>(std::cos(angle)) * model_.config.rope_scale;
      sines_[t * half + i] = static_cast<float>(std::sin(angle)) * model_.config.rope_scale;
    }
}

// Units that a thread takes at a time. Decoding, about a microsecond of reading, so that threads
// reach the barrier together; for a batch more, since each unit is much work.
size_t Session::chunk(size_t total, size_t unit_bytes) const {
  if (count_ > 1) return std::clamp<size_t>(total / (pool_.size() * 6), 2, kScratchBlocks);
  return std::clamp<size_t>(kChunkBytes / unit_bytes, 1, kScratchBlocks);
}

// RMSNorm and quantization of one row of x, by each thread for itself.
const Panel& Session::normalized_row(unsigned m, const float* x, const float* weight) {
  const size_t n = model_.config.hidden_size;
  Member& member = members_[m];
  kernels_.rms_norm(x, weight, n, model_.config.rms_eps, member.normed.data());
  member.panel.describe(1, n, member.normed.data());
  kernels_.quantize(member.normed.data(), n / kGroup, member.panel.row(0, 0, 0));
  return member.panel;
}

// The same for all of x. One token is cheaper to do again in each thread than to share; a batch is
// shared out by tiles.
const Panel& Session::normalized(unsigned m, const float* weight) {
  if (count_ == 1) return normalized_row(m, x_.data(), weight);
  const size_t n = model_.config.hidden_size;
  const float eps = model_.config.rms_eps;
  if (m == 0) panel_.describe(count_, n, normed_.data());
  barrier(m);
  share(m, (count_ + kMaxTile - 1) / kMaxTile, 1, [&](size_t begin, size_t end) {
    for (size_t t = begin * kMaxTile; t < std::min(end * kMaxTile, count_);) {
      const size_t tile = tile_size(count_ - t);
      for (size_t i = 0; i < tile; ++i) {
        float* row = &normed_[(t + i) * n];
        kernels_.rms_norm(&x_[(t + i) * n], weight, n, eps, row);
        kernels_.quantize(row, n / kGroup, panel_.row(t, i, 0));
      }
      t += tile;
    }
  });
  return panel_;
}

// Calls sink(first token, tokens, first block, blocks, outputs) with outputs [token][blocks * 16].
template <typename Sink>
void Session::project_blocks(unsigned m, const Matrix& w, const Panel& panel, size_t begin,
                             size_t end, Sink&& sink) {
  const MatmulFunction matmul = kernels_.matmul[static_cast<size_t>(w.kind)];
  float* outputs = members_[m].outputs.data();
  // Two blocks of weights stay in the first-level cache while a batch's tiles pass.
  const size_t step = panel.tokens() == 1 ? kScratchBlocks : 2;
  for (size_t b = begin; b < end; b += step) {
    const size_t blocks = std::min(step, end - b);
    for (size_t t = 0; t < panel.tokens();) {
      ActivationTile tile = panel.tile(t);
      if (t == 0) tile.ahead = &members_[m].ahead;
      matmul(w.data + b * w.block_bytes, blocks, w.cols, tile, outputs, blocks * kBlockRows);
      sink(t, tile.tokens, b, blocks, outputs);
      t += tile.tokens;
    }
  }
}

template <typename Sink>
void Session::project(unsigned m, const Matrix& w, const Panel& panel, Sink&& sink) {
  share(m, w.blocks(), chunk(w.blocks(), w.block_bytes), [&](size_t begin, size_t end) {
    project_blocks(m, w, panel, begin, end, sink);
  });
}

// x += w * panel
void Session::add_projection(unsigned m, const Matrix& w, const Panel& panel) {
  project(m, w, panel, [&](size_t t, size_t tokens, size_t b, size_t blocks, const float* y) {
    const size_t width = blocks * kBlockRows;
    for (size_t i = 0; i < tokens; ++i) {
      float* x = &x_[(t + i) * w.rows + b * kBlockRows];
      for (size_t j = 0; j < width; ++j) x[j] += y[i * width + j];
    }
  });
}

void Session::layer(unsigned m, const Layer& layer, size_t index) {
  start_phase(m, index * 4);
  // Nobody reads it between here and the barriers before it is filled.
  if (m == 0) hidden_panel_.describe(count_, layer.intermediate_size, hidden_.data());
  const Panel& attention_input = normalized(m, layer.attention_norm);
  struct Part {
    const Matrix& w;
    const float* bias;
    float* out;
  };
  const Part parts[] = {{layer.query, layer.query_bias, q_.data()},
                        {layer.key, layer.key_bias, k_.data()},
                        {layer.value, layer.value_bias, v_.data()}};
  const size_t total = layer.query.blocks() + layer.key.blocks() + layer.value.blocks();
  share(m, total, chunk(total, layer.query.block_bytes), [&](size_t begin, size_t end) {
    size_t first = 0;
    for (const Part& part : parts) {
      const size_t last = first + part.w.blocks();
      const size_t from = std::max(begin, first), to = std::min(end, last);
      if (from < to)
        project_blocks(
            m, part.w, attention_input, from - first, to - first,
            [&](size_t t, size_t tokens, size_t b, size_t blocks, const float* y) {
              const size_t width = blocks * kBlockRows;
              for (size_t i = 0; i < tokens; ++i) {
                float* out = part.out + (t + i) * part.w.rows + b * kBlockRows;
                for (size_t j = 0; j < width; ++j)
                  out[j] = y[i * width + j] + (part.bias ? part.bias[b * kBlockRows + j] : 0.0f);
              }
            });
      first = last;
    }
  });

  mark(m, &pslm_times::qkv_ns);
  start_phase(m, index * 4 + 1);
  count_ == 1 ? attend_one(m, index) : attend_many(m, index);
  mark(m, &pslm_times::attention_ns);
  add_projection(m, layer.output, attention_output(m, layer));
  mark(m, &pslm_times::output_ns);

  start_phase(m, index * 4 + 2);
  const Panel& mlp_input = normalized(m, layer.mlp_norm);
  const bool want_floats = !is_quantized(layer.down.kind);
  const size_t units = layer.intermediate_size / kGroup;
  share(m, units, chunk(units, 2 * (layer.gate.block_bytes + layer.up.block_bytes)), [&](size_t begin, size_t end) {
    Member& member = members_[m];
    float* gate = member.outputs.data();
    float* up = gate + kMaxTile * kGroup;
    const MatmulFunction gate_matmul = kernels_.matmul[static_cast<size_t>(layer.gate.kind)];
    const MatmulFunction up_matmul = kernels_.matmul[static_cast<size_t>(layer.up.kind)];
    for (size_t unit = begin; unit < end; ++unit)
      for (size_t t = 0; t < count_;) {
        ActivationTile tile = mlp_input.tile(t);
        if (t == 0) tile.ahead = &member.ahead;
        gate_matmul(layer.gate.data + unit * 2 * layer.gate.block_bytes, 2, layer.gate.cols, tile,
                    gate, kGroup);
        up_matmul(layer.up.data + unit * 2 * layer.up.block_bytes, 2, layer.up.cols, tile, up,
                  kGroup);
        kernels_.silu_mul(gate, up, tile.tokens * kGroup, gate);
        for (size_t i = 0; i < tile.tokens; ++i) {
          const float* row = gate + i * kGroup;
          kernels_.quantize(row, 1, hidden_panel_.row(t, i, unit));
          if (want_floats)
            std::memcpy(&hidden_[(t + i) * layer.intermediate_size + unit * kGroup], row,
                        kGroup * sizeof(float));
        }
        t += tile.tokens;
      }
  });
  mark(m, &pslm_times::gate_up_ns);
  start_phase(m, index * 4 + 3);
  add_projection(m, layer.down, hidden_panel_);
  mark(m, &pslm_times::down_ns);
}

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

void Session::run_head(unsigned m, Head head, float* logits) {
  const FileHeader& c = model_.config;
  const Matrix& w = model_.head.data ? model_.head : model_.embedding;
  start_phase(m, model_.layers.size() * 4);
  const Panel& input =
      head == Head::all_logits
          ? normalized(m, model_.final_norm)
          : normalized_row(m, &x_[(count_ - 1) * c.hidden_size], model_.final_norm);
  Member& member = members_[m];
  member.best_logit = -std::numeric_limits<float>::infinity();
  member.best_token = 0;
  project(m, w, input, [&](size_t t, size_t tokens, size_t b, size_t blocks, const float* y) {
    const size_t first = b * kBlockRows, width = blocks * kBlockRows;
    const size_t live = std::min(width, c.vocab_size - first);
    if (head != Head::greedy) {
      for (size_t i = 0; i < tokens; ++i)
        std::memcpy(logits + (t + i) * c.vocab_size + first, y + i * width, live * sizeof(float));
      return;
    }
    for (size_t j = 0; j < live; ++j)
      // Chunks taken from another thread may come out of order: the lower token wins a tie.
      if (y[j] > member.best_logit ||
          (y[j] == member.best_logit && static_cast<int32_t>(first + j) < member.best_token)) {
        member.best_logit = y[j];
        member.best_token = static_cast<int32_t>(first + j);
      }
  });
  mark(m, &pslm_times::head_ns);
}

}  // namespace pocketslm
