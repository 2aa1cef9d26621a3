#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "half.h"

namespace pocketslm {
namespace {

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
    const uint8_t* offsets = block + layout.offsets;
    int code;
    if (w.kind != WeightKind::q8_split && code_bits(w.kind) == 8) {
      code = block[k / 4 * 64 + r * 4 + k % 4];
    } else {
      const size_t at = k / 8 * 64 + r * 4 + k % 4;
      const int shift = k / 4 % 2 ? 4 : 0;
      code = block[at] >> shift & 15;
      if (w.kind == WeightKind::q8_split) code = code << 4 | (offsets[at] >> shift & 15);
    }
    const float scale =
        half_to_float(reinterpret_cast<const uint16_t*>(block + layout.scales)[entry]);
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
  for (unsigned m = 0; m < threads; ++m) members_[m].plan.build(model, pool_, m);
  work_.resize(threads);
  if (head_matrix().kind == WeightKind::q8_split) {
    highest_ = Buffer<float>(head_matrix().blocks());
    for (Member& member : members_) {
      member.screen.corrections.resize(c.hidden_size / kGroup);
      member.screen.energies.resize(c.hidden_size / kGroup);
    }
  }
}

void Session::bind_cache(void* const* places, size_t positions) {
  cache_.bind(places, positions);
  context_ = context_of(positions);
  length_ = 0;
}

void Session::forward(const int32_t* tokens, size_t count, pslm_logits which, float* logits) {
  trust_logits();
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
    members_[m].plan.finish();
  };
  pool_.run(region);
  length_ += count;
  if (count == 1) balance();
}

// Decoding is bound by memory, which cores share unevenly: each gets the part that it can read in
// the same time.
void Session::balance() {
  for (unsigned m = 0; m < threads(); ++m) work_[m] = members_[m].read_bytes;
  if (pool_.balance(work_))
    for (unsigned m = 0; m < threads(); ++m) members_[m].plan.build(model_, pool_, m);
  for (Member& member : members_) member.read_bytes = 0;
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

void Session::set_updates(std::vector<LayerUpdates> updates) {
  size_t widest = 0;
  for (const LayerUpdates& u : updates)
    widest = std::max({widest, u.query.rank + u.key.rank + u.value.rank, u.output.rank,
                       u.gate.rank + u.up.rank, u.down.rank});
  lowered_.assign(widest * kBatch, 0.0f);
  for (Member& member : members_) member.lowered.assign(widest, 0.0f);
  updates_ = std::move(updates);
  length_ = 0;
}

// What updates make of the input that they read: [token][update][rank], null where there is none.
// One token is cheaper to do again in each thread than to share.
const float* Session::lower(unsigned m, std::initializer_list<const LowRank*> updates,
                            const Panel& panel) {
  size_t width = 0;
  for (const LowRank* update : updates) width += update->rank;
  if (!width) return nullptr;
  float* out = count_ == 1 ? members_[m].lowered.data() : lowered_.data();
  const auto fill = [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      float* low = out + t * width;
      for (const LowRank* update : updates) {
        if (update->rank) update->lower(panel.values(t), low);
        low += update->rank;
      }
    }
  };
  count_ == 1 ? fill(0, 1) : share(m, count_, kMaxTile, fill);
  return out;
}

// x += w * panel
void Session::add_projection(unsigned m, const Matrix& w, const Panel& panel,
                             const LowRank& update) {
  const float* low = lower(m, {&update}, panel);
  project(m, w, panel, [&](size_t t, size_t tokens, size_t b, size_t blocks, const float* y) {
    const size_t width = blocks * kBlockRows;
    for (size_t i = 0; i < tokens; ++i) {
      float* x = &x_[(t + i) * w.rows + b * kBlockRows];
      for (size_t j = 0; j < width; ++j) x[j] += y[i * width + j];
      if (low) update.add(low + (t + i) * update.rank, b * kBlockRows, width, x);
    }
  });
}

void Session::layer(unsigned m, const Layer& layer, size_t index) {
  static const LayerUpdates kNone{};
  const LayerUpdates& updates = updates_.empty() ? kNone : updates_[index];
  members_[m].plan.start(index * kLayerPhases);
  // Nobody reads it between here and the barriers before it is filled.
  if (m == 0) hidden_panel_.describe(count_, layer.intermediate_size, hidden_.data());
  const Panel& attention_input = normalized(m, layer.attention_norm);
  struct Part {
    const Matrix& w;
    const float* bias;
    float* out;
    const LowRank& update;
  };
  const Part parts[] = {{layer.query, layer.query_bias, q_.data(), updates.query},
                        {layer.key, layer.key_bias, k_.data(), updates.key},
                        {layer.value, layer.value_bias, v_.data(), updates.value}};
  const float* low = lower(m, {&updates.query, &updates.key, &updates.value}, attention_input);
  const size_t ranks = updates.query.rank + updates.key.rank + updates.value.rank;
  const size_t total = layer.query.blocks() + layer.key.blocks() + layer.value.blocks();
  share_weights(m, total, layer.query.block_bytes, [&](size_t begin, size_t end) {
    size_t first = 0, rank = 0;
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
                if (low)
                  part.update.add(low + (t + i) * ranks + rank, b * kBlockRows, width, out);
              }
            });
      first = last, rank += part.update.rank;
    }
  });

  mark(m, &pslm_times::qkv_ns);
  members_[m].plan.start(index * kLayerPhases + 1);
  count_ == 1 ? attend_one(m, index) : attend_many(m, index);
  mark(m, &pslm_times::attention_ns);
  add_projection(m, layer.output, attention_output(m, layer), updates.output);
  mark(m, &pslm_times::output_ns);

  members_[m].plan.start(index * kLayerPhases + 2);
  const Panel& mlp_input = normalized(m, layer.mlp_norm);
  const bool want_floats = !is_quantized(layer.down.kind) || updates.down.rank;
  const float* mlp_low = lower(m, {&updates.gate, &updates.up}, mlp_input);
  const size_t mlp_ranks = updates.gate.rank + updates.up.rank;
  const size_t units = layer.intermediate_size / kGroup;
  const size_t unit_bytes = 2 * (layer.gate.block_bytes + layer.up.block_bytes);
  share_weights(m, units, unit_bytes, [&](size_t begin, size_t end) {
    Member& member = members_[m];
    float* gate = member.outputs.data();
    float* up = gate + kMaxTile * kGroup;
    const MatmulFunction gate_matmul = kernels_.matmul[static_cast<size_t>(layer.gate.kind)];
    const MatmulFunction up_matmul = kernels_.matmul[static_cast<size_t>(layer.up.kind)];
    for (size_t unit = begin; unit < end; ++unit)
      for (size_t t = 0; t < count_;) {
        ActivationTile tile = mlp_input.tile(t);
        if (t == 0) tile.ahead = &member.plan.ahead;
        gate_matmul(layer.gate.data + unit * 2 * layer.gate.block_bytes, 2, layer.gate.cols, tile,
                    gate, kGroup);
        up_matmul(layer.up.data + unit * 2 * layer.up.block_bytes, 2, layer.up.cols, tile, up,
                  kGroup);
        for (size_t i = 0; mlp_low && i < tile.tokens; ++i) {
          const float* row = mlp_low + (t + i) * mlp_ranks;
          updates.gate.add(row, unit * kGroup, kGroup, gate + i * kGroup);
          updates.up.add(row + updates.gate.rank, unit * kGroup, kGroup, up + i * kGroup);
        }
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
  members_[m].plan.start(index * kLayerPhases + 3);
  add_projection(m, layer.down, hidden_panel_, updates.down);
  mark(m, &pslm_times::down_ns);
}

}  // namespace pocketslm
