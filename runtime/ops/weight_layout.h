// How weight matrices lie in model.slm: one layout that every kernel family reads without repacking.
//
// A matrix [rows, cols] is cut into blocks of 16 rows; rows are padded to a multiple of 16. A float
// block is [cols][16 rows]. A quantized block holds the codes of all groups of 32 columns, then what
// scales them; each part is padded to 64 bytes.
//
// Codes. The 32 columns of a group are 8 quads of 4 columns. A line of 64 bytes is [16 rows][4
// bytes], a byte for each column of a quad, and holds
//
//   8 bits    quad j in line j
//   4 bits    quad 2j in the low nibbles of line j, quad 2j + 1 in the high ones
//   2 bits    quad 4j + i in bits 2i and 2i + 1 of line j
//   1 bit     quad j in bit j of the only line
//
// 3 bits are 2 bits and after them 1 bit more; 5 and 6 bits are 4 bits and 1 or 2 more. One line
// times four broadcast activations is one dot-product instruction of AVX-512 VNNI, two steps of
// AVX2, four of NEON.
//
// Scales, W = scale * (code - zero) + minimum:
//
//   half      fp16 [group][16], then the offsets: fp16 minimums [group][16], or uint8 zero points
//             [group][16], or nothing, where zero is half the range of the codes
//   byte      for each 256 columns, or for whole rows: a factor, fp16 [16]; with minimums theirs,
//             fp16 [16], too; then for each scale int8 [16] without minimums, else uint8 [16] and
//             uint8 minimums [16]
//   nibble    as bytes with minimums, but both in one byte: the scale in its low nibble
//
// A scale is its factor times the byte, a minimum minus its factor times the byte. With a table the
// codes stand for its values, and zero is 0.
//
// A split block of 8 bits begins as a symmetric 4-bit block of the codes' high nibbles does: read as
// one, it is the matrix to four bits. Low nibbles, in the order of 4-bit codes, end each block
// (q8_split), or lie behind the last block, so that what is not read stays out of memory (q8_apart).
#pragma once

#include <cstddef>
#include <cstdint>

#include "ids.h"

namespace pocketslm {

constexpr size_t kBlockRows = 16;
constexpr size_t kGroup = 32;

enum class Offset { none, minimum, zero_point };
enum class Scaling { half, byte, nibble };
enum class Table { none, iq4, fp4 };

// Values of 4-bit codes, as GGUF's IQ4 kinds and MXFP4 (times 2) have them.
constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
constexpr int8_t kFp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// What a kind is made of.
struct Form {
  unsigned bits;  // of a code; 0: no quantized kind
  Offset offset = Offset::none;
  Scaling scaling = Scaling::half;
  unsigned scale_columns = 32;  // columns that share a scale
  Table table = Table::none;
  bool split = false;
  size_t factor_columns = 256;  // columns that share a factor of byte and nibble scales
};
constexpr size_t kWholeRow = SIZE_MAX / 2;  // all columns do

// Functions here have internal linkage: files compiled for different instruction sets include them,
// and the linker must not pick one file's copy for all. What kernels ask of their kind is inlined,
// which Clang does not do by itself, so that it is a constant.
#define POCKETSLM_FOLDED static constexpr inline __attribute__((always_inline))
POCKETSLM_FOLDED Form rows_of(Form form) {
  form.factor_columns = kWholeRow;
  return form;
}
POCKETSLM_FOLDED Form form_of(WeightKind kind) {
  switch (kind) {
    case WeightKind::q4_sym: return {4};
    case WeightKind::q4_min: return {4, Offset::minimum};
    case WeightKind::q4_zp: return {4, Offset::zero_point};
    case WeightKind::q8_sym: return {8};
    case WeightKind::q8_min: return {8, Offset::minimum};
    case WeightKind::q8_zp: return {8, Offset::zero_point};
    case WeightKind::q8_split:
    case WeightKind::q8_apart: return {8, Offset::none, Scaling::half, 32, Table::none, true};
    case WeightKind::q2_sym: return {2};
    case WeightKind::q3_sym: return {3};
    case WeightKind::q5_sym: return {5};
    case WeightKind::q6_sym: return {6};
    case WeightKind::q2_min: return {2, Offset::minimum};
    case WeightKind::q3_min: return {3, Offset::minimum};
    case WeightKind::q5_min: return {5, Offset::minimum};
    case WeightKind::q6_min: return {6, Offset::minimum};
    case WeightKind::iq4: return {4, Offset::none, Scaling::half, 32, Table::iq4};
    case WeightKind::fp4: return {4, Offset::none, Scaling::half, 32, Table::fp4};
    case WeightKind::q3_k: return {3, Offset::minimum, Scaling::byte};
    case WeightKind::q4_k: return {4, Offset::minimum, Scaling::byte};
    case WeightKind::q5_k: return {5, Offset::minimum, Scaling::byte};
    case WeightKind::q6_k: return {6, Offset::minimum, Scaling::byte};
    case WeightKind::q2_r: return rows_of({2, Offset::minimum, Scaling::byte});
    case WeightKind::q3_r: return rows_of({3, Offset::minimum, Scaling::byte});
    case WeightKind::q4_r: return rows_of({4, Offset::minimum, Scaling::byte});
    case WeightKind::q5_r: return rows_of({5, Offset::minimum, Scaling::byte});
    case WeightKind::q6_r: return rows_of({6, Offset::minimum, Scaling::byte});
    case WeightKind::iq4_k: return {4, Offset::none, Scaling::byte, 32, Table::iq4};
    case WeightKind::q3_k16: return {3, Offset::none, Scaling::byte, 16};
    case WeightKind::q6_k16: return {6, Offset::none, Scaling::byte, 16};
    case WeightKind::q2_k16: return {2, Offset::minimum, Scaling::nibble, 16};
    default: return {0};
  }
}

// Of values that products are made of: a table's lie on 128, as unsigned bytes do.
static constexpr unsigned value_bits(const Form& form) {
  return form.table == Table::none ? form.bits : 8;
}
// The code whose value is 0 in a kind without offsets.
static constexpr int zero_of(const Form& form) { return 1 << (value_bits(form) - 1); }

// Codes of 3, 5 and 6 bits lie in two planes.
static constexpr unsigned low_bits(const Form& form) {
  return form.split || (form.bits >= 4 && form.bits < 8) ? 4 : form.bits == 8 ? 8 : 2;
}

static constexpr bool is_quantized(WeightKind kind) { return form_of(kind).bits != 0; }
static constexpr bool is_matrix(WeightKind kind) {
  return is_quantized(kind) || kind == WeightKind::f32 || kind == WeightKind::f16;
}

// Bytes from one group's codes to the next one's.
static constexpr size_t group_bytes(const Form& form) {
  return kGroup * kBlockRows * (form.split ? 4 : form.bits) / 8;
}

static constexpr size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Scales and minimums of columns with one factor, where they are bytes or nibbles: where the first
// scale's lie, bytes from a scale's 16 to the next one's, and bytes in all.
struct Factored {
  size_t first, step, bytes;
};
static constexpr Factored factored(const Form& form) {
  const bool minimums = form.offset == Offset::minimum;
  const size_t first = kBlockRows * (minimums ? 4 : 2);
  const size_t step = kBlockRows * (minimums && form.scaling == Scaling::byte ? 2 : 1);
  return {first, step, first + form.factor_columns / form.scale_columns * step};
}

// Columns of a matrix of this kind are a multiple of this.
static constexpr size_t column_unit(WeightKind kind) {
  const Form form = form_of(kind);
  return form.scaling == Scaling::half || form.factor_columns == kWholeRow ? kGroup
                                                                           : form.factor_columns;
}

// Byte offsets inside one block of 16 rows. Split codes have their low nibbles at `offsets`.
struct BlockLayout {
  size_t scales, offsets, bytes;
};

POCKETSLM_FOLDED BlockLayout block_layout(WeightKind kind, size_t cols) {
  if (!is_quantized(kind)) return {0, 0, cols * kBlockRows * (kind == WeightKind::f32 ? 4 : 2)};
  const Form form = form_of(kind);
  const size_t groups = cols / kGroup;
  const size_t scales = groups * group_bytes(form);
  if (form.scaling != Scaling::half) {
    const Factored parts = factored(form);
    const size_t bytes = round_up(form.factor_columns == kWholeRow
                                      ? parts.first + groups * parts.step
                                      : cols / form.factor_columns * parts.bytes,
                                  64);
    return {scales, scales + bytes, scales + bytes};
  }
  const size_t offsets = scales + round_up(groups * kBlockRows * 2, 64);
  if (kind == WeightKind::q8_split) return {scales, offsets, offsets + scales};
  const size_t offset_bytes = form.offset == Offset::minimum      ? 2
                              : form.offset == Offset::zero_point ? 1
                                                                  : 0;
  return {scales, offsets, offsets + round_up(groups * kBlockRows * offset_bytes, 64)};
}

// Consecutive blocks of a matrix, and the low nibbles of split ones.
struct Blocks {
  const uint8_t* data = nullptr;
  const uint8_t* low = nullptr;
  size_t stride = 0, low_stride = 0;  // bytes from block to block

  Blocks from(size_t block) const {
    return {data + block * stride, low ? low + block * low_stride : nullptr, stride, low_stride};
  }
};

// A packed matrix as it lies in the mapped file. `kind` is one that has kernels.
struct Matrix {
  Blocks first;
  WeightKind kind = WeightKind::f32;
  size_t rows = 0, cols = 0;
  size_t block_bytes = 0;  // of all that a block holds, wherever it lies

  const uint8_t* data() const { return first.data; }
  size_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  size_t bytes() const { return blocks() * block_bytes; }
  Blocks from(size_t block) const { return first.from(block); }
  // Whether low nibbles lie behind the last block.
  bool apart() const { return first.low && first.low_stride != first.stride; }
  // Bytes that a block's share of a greedy step reads.
  size_t read_bytes() const {
    return kind == WeightKind::q8_split ? block_layout(WeightKind::q4_sym, cols).bytes
                                        : block_bytes;
  }
};

static inline Matrix matrix_at(const uint8_t* data, WeightKind kind, size_t rows, size_t cols) {
  const size_t bytes = block_layout(kind, cols).bytes;
  Matrix matrix{{data, nullptr, bytes, 0}, kind, rows, cols, bytes};
  if (!form_of(kind).split) return matrix;
  matrix.kind = WeightKind::q8_split;
  if (kind == WeightKind::q8_split) {
    matrix.first.low = data + block_layout(kind, cols).offsets;
    matrix.first.low_stride = bytes;
  } else {
    matrix.first.low = data + matrix.blocks() * bytes;
    matrix.first.low_stride = cols / kGroup * group_bytes(form_of(kind));
    matrix.block_bytes += matrix.first.low_stride;
  }
  return matrix;
}

}  // namespace pocketslm
