// One quantized weight at a time, as weight_layout.h defines it: for the scalar path and for the rows
// of embeddings.
#pragma once

#include "half.h"
#include "weight_layout.h"

namespace pocketslm {

// The parts of one block.
struct BlockParts {
  const uint8_t *codes, *low, *scales, *offsets;
};
static inline BlockParts parts_of(const Blocks& block, const BlockLayout& layout) {
  return {block.data, block.low, block.data + layout.scales, block.data + layout.offsets};
}

// `count` bits of column k of the group, of a plane with so many bits a code; see weight_layout.h.
static inline int bits_at(const uint8_t* plane, unsigned count, size_t row, size_t k) {
  const size_t quad = k / 4, per_line = 8 / count;
  const uint8_t byte = plane[quad / per_line * 64 + row * 4 + k % 4];
  return byte >> (quad % per_line * count) & ((1 << count) - 1);
}

static inline int code_at(const Form& form, const BlockParts& block, size_t row, size_t column) {
  const size_t at = column / kGroup * group_bytes(form), k = column % kGroup;
  const unsigned low = low_bits(form);
  const int first = bits_at(block.codes + at, low, row, k);
  if (form.split) return first << 4 | bits_at(block.low + at, 4, row, k);
  if (form.bits == low) return first;
  const uint8_t* rest = block.codes + at + kGroup * kBlockRows * low / 8;
  return bits_at(rest, form.bits - low, row, k) << low | first;
}

// What a scale is multiplied with.
static inline int value_at(const Form& form, const BlockParts& block, size_t row, size_t column) {
  const int code = code_at(form, block, row, column);
  if (form.table == Table::iq4) return kIq4Values[code];
  if (form.table == Table::fp4) return kFp4Values[code];
  if (form.offset == Offset::none) return code - zero_of(form);
  if (form.offset == Offset::zero_point)
    return code - block.offsets[column / kGroup * kBlockRows + row];
  return code;
}

struct ScaleAndMinimum {
  float scale, minimum;
};
static inline ScaleAndMinimum scale_at(const Form& form, const BlockParts& block, size_t row,
                                       size_t column) {
  const auto half = [row](const uint8_t* from, size_t entry) {
    return half_to_float(reinterpret_cast<const uint16_t*>(from)[entry * kBlockRows + row]);
  };
  const bool minimums = form.offset == Offset::minimum;
  if (form.scaling == Scaling::half) {
    const size_t group = column / kGroup;
    return {half(block.scales, group), minimums ? half(block.offsets, group) : 0.0f};
  }
  const Factored parts = factored(form);
  const uint8_t* super = block.scales + column / form.factor_columns * parts.bytes;
  const size_t entry = column % form.factor_columns / form.scale_columns;
  const uint8_t* bytes = super + parts.first + entry * parts.step + row;
  const float factor = half(super, 0);
  if (!minimums) return {factor * static_cast<float>(static_cast<int8_t>(*bytes)), 0.0f};
  const bool nibbles = form.scaling == Scaling::nibble;
  const int scale = nibbles ? *bytes & 15 : *bytes;
  const int minimum = nibbles ? *bytes >> 4 : bytes[kBlockRows];
  return {factor * static_cast<float>(scale), -half(super, 1) * static_cast<float>(minimum)};
}

}  // namespace pocketslm
