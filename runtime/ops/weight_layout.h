// How weight matrices lie in model.slm: one layout that every kernel family reads without repacking.
//
// A matrix [rows, cols] is cut into blocks of 16 rows; rows are padded to a multiple of 16. A
// quantized block is, for all groups of 32 columns in turn,
//
//   codes   4 bits: [group][4][16 rows][4 bytes]: a 64-byte line holds for each row columns
//                   8j..8j+3 in its low nibbles and 8j+4..8j+7 in its high ones
//           8 bits: [group][8][16 rows][4 bytes]: columns 4j..4j+3, stored as unsigned
//           8 bits split: the codes' high nibbles as 4 bits, and their low nibbles, in the same
//                   order, after the scales
//   scales  fp16 [group][16], padded to 64 bytes
//   offsets minimum: fp16 [group][16], padded; zero point: uint8 [group][16], padded; else absent
//
// so that one 64-byte line times four broadcast activations is one dot-product instruction of
// AVX-512 VNNI, two steps of AVX2, four of NEON. W = scale * (code - zero) + minimum.
// A split block begins as a symmetric 4-bit block does: read as one, it is the matrix to four bits.
// A float block is [cols][16 rows].
#pragma once

#include <cstddef>
#include <cstdint>

#include "ids.h"

namespace pocketslm {

constexpr size_t kBlockRows = 16;
constexpr size_t kGroup = 32;

enum class Offset { none, minimum, zero_point };

// Functions here have internal linkage: files compiled for different instruction sets include them,
// and the linker must not pick one file's copy for all.
static constexpr bool is_quantized(WeightKind kind) { return kind >= WeightKind::q4_sym; }
static constexpr unsigned code_bits(WeightKind kind) { return kind >= WeightKind::q8_sym ? 8 : 4; }
static constexpr Offset offset_of(WeightKind kind) {
  return kind == WeightKind::q4_min || kind == WeightKind::q8_min ? Offset::minimum
         : kind == WeightKind::q4_zp || kind == WeightKind::q8_zp ? Offset::zero_point
                                                                  : Offset::none;
}

// Bytes from one group's codes to the next one's.
static constexpr size_t group_bytes(WeightKind kind) {
  return kGroup * kBlockRows * (kind == WeightKind::q8_split ? 4 : code_bits(kind)) / 8;
}

static constexpr size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Byte offsets inside one block of 16 rows. Split codes have their low nibbles at `offsets`.
struct BlockLayout {
  size_t scales, offsets, bytes;
};

static constexpr BlockLayout block_layout(WeightKind kind, size_t cols) {
  if (!is_quantized(kind)) return {0, 0, cols * kBlockRows * (kind == WeightKind::f32 ? 4 : 2)};
  const size_t groups = cols / kGroup;
  const size_t scales = groups * group_bytes(kind);
  const size_t offsets = scales + round_up(groups * kBlockRows * 2, 64);
  if (kind == WeightKind::q8_split) return {scales, offsets, offsets + scales};
  const Offset offset = offset_of(kind);
  const size_t offset_bytes = offset == Offset::minimum      ? 2
                              : offset == Offset::zero_point ? 1
                                                             : 0;
  return {scales, offsets, offsets + round_up(groups * kBlockRows * offset_bytes, 64)};
}

// A packed matrix as it lies in the mapped file.
struct Matrix {
  const uint8_t* data = nullptr;
  WeightKind kind = WeightKind::f32;
  size_t rows = 0, cols = 0;
  size_t block_bytes = 0;

  size_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  size_t bytes() const { return blocks() * block_bytes; }
};

}  // namespace pocketslm
