// Low-rank updates of a layer's matrices, as a LoRA adapter has them: y += b^T (a^T x).
#pragma once

#include <cstddef>
#include <vector>

namespace pocketslm {

constexpr size_t kMaxRank = 1024;

struct LowRank {
  size_t rank = 0, rows = 0;  // rank 0: nothing is added
  std::vector<float> a, b;    // [cols][rank], [rank][rows]

  // low[r] = sum over columns of x[c] * a[c][r]
  void lower(const float* x, float* low) const {
    for (size_t r = 0; r < rank; ++r) low[r] = 0;
    for (size_t c = 0; c < a.size() / rank; ++c)
      for (size_t r = 0; r < rank; ++r) low[r] += x[c] * a[c * rank + r];
  }
  // out[j] += row `first + j` of the update, for `count` rows
  void add(const float* low, size_t first, size_t count, float* out) const {
    for (size_t r = 0; r < rank; ++r) {
      const float* row = &b[r * rows + first];
      for (size_t j = 0; j < count; ++j) out[j] += low[r] * row[j];
    }
  }
};

// Of the matrices of one step of a program.
struct StepUpdates {
  LowRank of[3];
};

}  // namespace pocketslm
