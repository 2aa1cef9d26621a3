// Low-rank updates of a layer's matrices, as a LoRA adapter has them: y += b^T (a^T x).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "half.h"
#include "kernels.h"

namespace pocketslm {

constexpr size_t kMaxRank = 1024;

// In fp16, as the kernels read it. rank 0: nothing is added.
struct LowRank {
  size_t rank = 0, cols = 0;
  std::vector<uint16_t> a;  // [panels][cols][16]: ranks in panels of 16, the last one padded by zeros
  std::vector<uint16_t> b;  // [rows / 16][rank][16]

  size_t panels() const { return (rank + kBlockRows - 1) / kBlockRows; }
  size_t width() const { return panels() * kBlockRows; }

  // Of a [cols][rank] and b [rank][rows], rows % 16 == 0.
  static LowRank packed(const float* a, const float* b, size_t rank, size_t rows, size_t cols) {
    LowRank update;
    update.rank = rank, update.cols = cols;
    update.a.assign(update.width() * cols, 0);
    update.b.resize(rank * rows);
    for (size_t c = 0; c < cols; ++c)
      for (size_t r = 0; r < rank; ++r)
        update.a[(r / kBlockRows * cols + c) * kBlockRows + r % kBlockRows] =
            float_to_half(a[c * rank + r]);
    for (size_t r = 0; r < rank; ++r)
      for (size_t j = 0; j < rows; ++j)
        update.b[(j / kBlockRows * rank + r) * kBlockRows + j % kBlockRows] =
            float_to_half(b[r * rows + j]);
    return update;
  }
  // low[r] = sum over columns of x[c] * a[c][r], for width() ranks
  void lower(const Kernels& kernels, const float* x, float* low) const {
    kernels.lower_rank(a.data(), x, cols, panels(), low);
  }
  // out[j] += row `first + j` of the update, for `count` rows; both are multiples of 16.
  void add(const Kernels& kernels, const float* low, size_t first, size_t count,
           float* out) const {
    if (rank) kernels.add_low_rank(&b[first * rank], low, rank, count / kBlockRows, out);
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
};

}  // namespace pocketslm
