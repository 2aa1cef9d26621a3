// Low-rank updates of a layer's matrices, as a LoRA adapter has them: y += b^T (a^T x).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "buffers.h"
#include "half.h"
#include "kernels.h"

namespace pocketslm {

constexpr size_t kMaxRank = 1024;
constexpr float kLeastPeak = 1e-9f;  // far below what fp16 holds; a rank of zeros has a scale, too

// As the kernels read it. rank 0: nothing is added. Factors of a matrix of floats are fp16. Those of a
// quantized matrix are int8 with a scale for each rank, and so lose about what int8 weights do.
struct LowRank {
  size_t rank = 0, rows = 0, cols = 0;
  bool rounded = false;
  const uint8_t* a = nullptr;  // [panels][cols][16]: ranks in panels of 16, the last padded by zeros
  const uint8_t* b = nullptr;  // [rows / 16][rank][16]
  std::vector<float> scales;   // [width()] of a and b together, where they are int8
  std::vector<uint8_t> own;    // a and b, as long as they lie with no others

  size_t panels() const { return (rank + kBlockRows - 1) / kBlockRows; }
  size_t width() const { return panels() * kBlockRows; }
  size_t number_bytes() const { return rounded ? sizeof(int8_t) : sizeof(uint16_t); }
  size_t a_size() const { return width() * cols * number_bytes(); }
  size_t b_size() const { return rank * rows * number_bytes(); }

  // Of a [cols][rank] and b [rank][rows], rows % 16 == 0.
  static LowRank packed(const float* a, const float* b, size_t rank, size_t rows, size_t cols,
                        bool rounded) {
    LowRank update;
    update.rank = rank, update.rows = rows, update.cols = cols, update.rounded = rounded;
    update.own.assign(update.a_size() + update.b_size(), 0);
    update.a = update.own.data(), update.b = update.a + update.a_size();
    const auto in_a = [&](size_t c, size_t r) {
      return (r / kBlockRows * cols + c) * kBlockRows + r % kBlockRows;
    };
    const auto in_b = [&](size_t r, size_t j) {
      return (j / kBlockRows * rank + r) * kBlockRows + j % kBlockRows;
    };
    const auto put = [&](size_t first, size_t at, float x) {
      uint8_t* to = update.own.data() + first + at * update.number_bytes();
      if (rounded) {
        const auto code = static_cast<int8_t>(std::lround(x));
        std::memcpy(to, &code, sizeof code);
      } else {
        const uint16_t half = float_to_half(x);
        std::memcpy(to, &half, sizeof half);
      }
    };
    if (rounded) update.scales.assign(update.width(), 0);
    for (size_t r = 0; r < rank; ++r) {
      float to_a = 1, to_b = 1;
      if (rounded) {
        float peak_a = kLeastPeak, peak_b = kLeastPeak;
        for (size_t c = 0; c < cols; ++c) peak_a = std::max(peak_a, std::abs(a[c * rank + r]));
        for (size_t j = 0; j < rows; ++j) peak_b = std::max(peak_b, std::abs(b[r * rows + j]));
        to_a = 127 / peak_a, to_b = 127 / peak_b;
        update.scales[r] = 1 / to_a / to_b;
      }
      for (size_t c = 0; c < cols; ++c) put(0, in_a(c, r), a[c * rank + r] * to_a);
      for (size_t j = 0; j < rows; ++j) put(update.a_size(), in_b(r, j), b[r * rows + j] * to_b);
    }
    return update;
  }
  // low[r] = sum over columns of x[c] * a[c][r], for width() ranks, as add() takes it
  void lower(const Kernels& kernels, const float* x, float* low) const {
    if (!rounded)
      return kernels.lower_rank_f16(reinterpret_cast<const uint16_t*>(a), x, cols, panels(), low);
    kernels.lower_rank_i8(reinterpret_cast<const int8_t*>(a), x, cols, panels(), low);
    for (size_t r = 0; r < width(); ++r) low[r] *= scales[r];
  }
  // out[j] += row `first + j` of the update, for `count` rows; both are multiples of 16.
  void add(const Kernels& kernels, const float* low, size_t first, size_t count,
           float* out) const {
    if (!rank) return;
    const uint8_t* from = b + first * rank * number_bytes();
    const size_t blocks = count / kBlockRows;
    if (rounded)
      kernels.add_low_rank_i8(reinterpret_cast<const int8_t*>(from), low, rank, blocks, out);
    else
      kernels.add_low_rank_f16(reinterpret_cast<const uint16_t*>(from), low, rank, blocks, out);
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
  Buffer<uint8_t> memory;  // what they are made of, in the order that it is read

  // Moves all of it together.
  void gather() {
    size_t total = 0;
    for (const StepUpdates& step : steps)
      for (const LowRank& update : step.of) total += update.own.size();
    memory = Buffer<uint8_t>(total);
    uint8_t* next = memory.data();
    const auto move = [&](const uint8_t*& from, size_t size) {
      std::copy_n(from, size, next);
      from = next;
      next += size;
    };
    for (StepUpdates& step : steps) {
      for (LowRank& update : step.of) move(update.a, update.a_size());
      for (LowRank& update : step.of) move(update.b, update.b_size());
      for (LowRank& update : step.of) std::vector<uint8_t>().swap(update.own);
    }
    if (total) platform::use_large_pages(memory.data(), memory.bytes());
  }
};

}  // namespace pocketslm
