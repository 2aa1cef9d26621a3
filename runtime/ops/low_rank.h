// Low-rank updates of a layer's matrices, as a LoRA adapter has them: y += b^T (a^T x).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffers.h"
#include "half.h"
#include "kernels.h"

namespace pocketslm {

constexpr size_t kMaxRank = 1024;

// In fp16, as the kernels read it. rank 0: nothing is added.
struct LowRank {
  size_t rank = 0, rows = 0, cols = 0;
  const uint16_t* a = nullptr;  // [panels][cols][16]: ranks in panels of 16, the last padded by zeros
  const uint16_t* b = nullptr;  // [rows / 16][rank][16]
  std::vector<uint16_t> own;    // both of them, as long as they lie with no others

  size_t panels() const { return (rank + kBlockRows - 1) / kBlockRows; }
  size_t width() const { return panels() * kBlockRows; }
  size_t a_size() const { return width() * cols; }
  size_t b_size() const { return rank * rows; }

  // Of a [cols][rank] and b [rank][rows], rows % 16 == 0.
  static LowRank packed(const float* a, const float* b, size_t rank, size_t rows, size_t cols) {
    LowRank update;
    update.rank = rank, update.rows = rows, update.cols = cols;
    update.own.assign(update.a_size() + update.b_size(), 0);
    uint16_t* first = update.own.data();
    uint16_t* second = first + update.a_size();
    for (size_t c = 0; c < cols; ++c)
      for (size_t r = 0; r < rank; ++r)
        first[(r / kBlockRows * cols + c) * kBlockRows + r % kBlockRows] =
            float_to_half(a[c * rank + r]);
    for (size_t r = 0; r < rank; ++r)
      for (size_t j = 0; j < rows; ++j)
        second[(j / kBlockRows * rank + r) * kBlockRows + j % kBlockRows] =
            float_to_half(b[r * rows + j]);
    update.a = first, update.b = second;
    return update;
  }
  // low[r] = sum over columns of x[c] * a[c][r], for width() ranks
  void lower(const Kernels& kernels, const float* x, float* low) const {
    kernels.lower_rank(a, x, cols, panels(), low);
  }
  // out[j] += row `first + j` of the update, for `count` rows; both are multiples of 16.
  void add(const Kernels& kernels, const float* low, size_t first, size_t count,
           float* out) const {
    if (rank) kernels.add_low_rank(b + first * rank, low, rank, count / kBlockRows, out);
  }
};

// Of the matrices of one step of a program, which read the same.
struct StepUpdates {
  LowRank of[3];

  size_t width() const { return before(3); }
  // The ranks of those before one.
  size_t before(size_t part) const {
    size_t width = 0;
    for (size_t i = 0; i < part; ++i) width += of[i].width();
    return width;
  }
};

// An adapter: one entry a step, or none at all.
struct Updates {
  std::vector<StepUpdates> steps;
  bool of_hidden = false;  // one of the products of an MLP's hidden values, which it reads as floats
  Buffer<uint16_t> memory;  // what they are made of, in the order that it is read

  // Moves all of it together.
  void gather() {
    size_t total = 0;
    for (const StepUpdates& step : steps)
      for (const LowRank& update : step.of) total += update.own.size();
    memory = Buffer<uint16_t>(total);
    uint16_t* next = memory.data();
    const auto move = [&](const uint16_t*& from, size_t size) {
      std::copy_n(from, size, next);
      from = next;
      next += size;
    };
    for (StepUpdates& step : steps) {
      for (LowRank& update : step.of) move(update.a, update.a_size());
      for (LowRank& update : step.of) move(update.b, update.b_size());
      for (LowRank& update : step.of) std::vector<uint16_t>().swap(update.own);
    }
    if (total) platform::use_large_pages(memory.data(), memory.bytes());
  }
};

}  // namespace pocketslm
