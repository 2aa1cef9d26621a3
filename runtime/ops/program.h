// The program of a model: what a session runs, one operation after the other.
//
// Version 3 of model.slm carries it as a section of fixed-size records; versions 1 and 2, which know
// one block only, are read as that block's program. Operations work on a few buffers, one row a
// token: the residual stream, query / key / value, attended (what attention or a convolution gives)
// and hidden (the inside of an MLP).
//
//   embed        residual = numbers[0] * embedding[token] (+ positions[position])
//                  sections: embedding, positions or none
//   norm         buffer = norm(buffer), group by group, in place
//                  sections: weight [group] or none, bias [group] or none
//                  sizes: BUFFER, width, group (divides width); norm: NORM; numbers: eps
//   project      query, key, value = W[i] norm(residual) + bias[i], for one to three matrices
//                  sections: norm weight, norm bias, W0, W1, W2, bias0, bias1, bias2 (or none)
//                  norm: NORM; numbers: eps
//   attend       attended = attention(query, key, value), with keys and values kept in a state
//                  sections: rotary frequencies [rope_dim / 2] or none, query norm [head_dim] or
//                            none, key norm [head_dim] or none (RMS, a head at a time)
//                  sizes: state, heads, kv_heads, head_dim, rope_dim, window (0: all positions;
//                         else a token sees itself and the window - 1 before it; where attention
//                         is bidirectional, the window - 1 after it too),
//                         positions of one step of the query's temperature (0: none)
//                  flags: ATTEND; numbers: scale, score cap (0: none; else cap * tanh(score / cap)),
//                         eps of the norms, factor of the cosines and sines, temperature:
//                         query *= 1 + temperature * log(1 + floor(position / step))
//   project_add  residual += numbers[0] * norm(W input + bias), with input attended or hidden
//                  sections: W, bias, norm weight, norm bias (or none)
//                  sizes: BUFFER (attended or hidden); norm: NORM; numbers: scale, eps
//   gated        hidden = activation(gate norm(residual) + bias) * (up norm(residual) + bias);
//                  without a gate: activation(up norm(residual) + bias)
//                  sections: norm weight, norm bias, gate or none, up, gate bias, up bias (or none)
//                  sizes: ACTIVATION; norm: NORM; numbers: eps
//   short_conv   with b = query, c = key, x = value, each [width]:
//                attended = c * causal depthwise convolution of (b * x) over the last `taps` tokens
//                  sections: taps as a vector [width * taps] (taps of a channel adjacent, the newest
//                            last), bias [width] or none
//                  sizes: state, width, taps
//   head         output = logits: softcap(numbers[1] * (W norm(residual) + bias))
//                  sections: norm weight, norm bias, W or none, bias; without W the output is the
//                            normalized residual stream itself (an encoder)
//                  norm: NORM; numbers: eps, factor of the logits, cap of the logits (0: none)
//
// A program begins with embed, ends with head, and has neither in between. What an operation does
// not use is kNone or 0. Scales and factors are never 0: 1 is the one that changes nothing. Of the
// header, version 3 uses hidden_size, layers, vocab_size and max_context; the program says the rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "pocketslm.h"
#include "weight_layout.h"

namespace pocketslm {

constexpr uint32_t kNone = 0xffffffff;  // no such section
constexpr size_t kMaxOperations = 16384;
constexpr uint32_t kMaxDimension = 1u << 20;  // of a matrix, the vocabulary apart

struct OperationRecord {
  uint16_t code;   // CODE
  uint16_t norm;   // NORM
  uint32_t layer;  // that an adapter's update or a message names; kNone outside the layers
  uint32_t flags;
  uint32_t sections[10];  // indices into the table of sections, kNone where there is none
  uint32_t sizes[8];
  float numbers[8];
  uint32_t reserved[3];  // zero
};
static_assert(sizeof(OperationRecord) == 128);

struct StateRecord {
  uint32_t kind;  // STATE
  // kv: kv_heads, head_dim, window (0: all positions); conv: width, taps, 0
  uint32_t sizes[3];
};
static_assert(sizeof(StateRecord) == 16);

// A failed check: the status for the C border and one line that says what was wrong.
struct Failure {
  pslm_status status = PSLM_OK;
  std::string text;
  explicit operator bool() const { return status != PSLM_OK; }
};

// An entry of the file's table. In version 3, role and layer are only there for messages.
struct Section {
  uint16_t role, kind;
  uint32_t layer;
  uint32_t rows, cols;
  uint64_t offset, bytes;
};
static_assert(sizeof(Section) == 32);

// The sections of a file, whose bytes lie within it.
struct SectionTable {
  const uint8_t* data = nullptr;  // of the file
  std::vector<Section> sections;
  std::vector<Matrix> matrices;  // one a section; empty where it is none
};

// What operations refer to, checked and at hand. A norm of kind `none` has no weight; any other has
// a weight, and a layer norm a bias, if only of ones and zeros.
struct Norm {
  NormKind kind = NormKind::none;
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0;
};
struct Rotary {
  const float* frequencies;  // [half]
  size_t half;
  float factor;  // of the cosines and sines
};

// An operation as the session runs it; which of the fields it has, its code says.
struct Step {
  Code code{};
  uint32_t layer = kNone;
  Norm norm;
  const Matrix* w[3]{};  // embed: embedding, positions; project: W0..2; gated: gate, up; else W
  const float* bias[3]{};
  float scale = 1;      // of the embedding, the scores, what is added or the logits
  float cap = 0;        // of scores or logits; 0 where there is none
  BufferId buffer{};    // norm, project_add
  size_t width = 0;     // norm, short_conv; of attended after attend, of hidden after gated
  size_t group = 0;     // norm
  size_t state = 0;     // attend, short_conv
  size_t heads = 0, kv_heads = 0, head_dim = 0, window = 0;
  size_t rotary = kNone;  // of Program::rotaries
  uint32_t flags = 0;
  const float *query_norm = nullptr, *key_norm = nullptr;
  float temperature = 0;
  size_t temperature_step = 0;
  const float* taps = nullptr;  // [width][tap_count]
  size_t tap_count = 0;
  Activation activation{};
  // How steps share buffers. Attention of one token leaves pieces, which whoever reads them joins:
  // a product by itself, from the step `source`; for a norm the attention does it, which `gathers`.
  // A gated step leaves int8 activations, and floats only where it `keeps_floats`.
  size_t source = kNone;
  bool gathers = false, keeps_floats = false;
  bool reads_floats = false;  // project, gated: some matrix is not quantized
  uint64_t pslm_times::* counter = nullptr;

  bool has(uint32_t flag) const { return flags & flag; }
};

struct Program {
  std::vector<Step> steps;
  std::vector<StateRecord> states;
  std::vector<Rotary> rotaries;
  bool bidirectional = false;  // somewhere in it
  uint32_t hidden_size = 0;
  size_t widths[kBuffers]{};  // the widest that each buffer gets
  size_t widest_heads = 0, widest_kv_heads = 0, widest_head_dim = 0;
  std::vector<float> ones, zeros;  // of norms that have no weight or bias

  const Step& embed() const { return steps.front(); }
  const Step& head() const { return steps.back(); }
  size_t width(BufferId buffer) const { return widths[static_cast<size_t>(buffer)]; }
  size_t widest() const;
};

struct ProgramLimits {
  uint32_t hidden_size, vocab_size, max_context, layers;
};

// Checks every record against the sections and the ones before it, and resolves it. Weights that no
// operation uses are an error if `all_used`.
Failure resolve(const SectionTable& table, const ProgramLimits& limits,
                const std::vector<OperationRecord>& operations,
                const std::vector<StateRecord>& states, bool all_used, Program& program);

std::string describe(const Section& section);
Failure format_error(std::string text);

}  // namespace pocketslm
