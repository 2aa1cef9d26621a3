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
//                         else a token sees itself and the window - 1 before it),
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
// A program begins with embed, ends with head, and has neither in between.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pocketslm {

constexpr uint32_t kNone = 0xffffffff;  // no such section
constexpr size_t kMaxOperations = 16384;

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

}  // namespace pocketslm
