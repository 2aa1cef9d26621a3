// Whether numbers are neither NaN nor infinite.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pocketslm {

// By their bits, so that compilers make vectors of it: an exponent of ones, the sign aside, carries
// into the highest bit.
inline bool all_finite(const float* x, size_t n) {
  uint32_t carries = 0;
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    carries |= (bits & 0x7fffffffu) + 0x00800000u;
  }
  return carries >> 31 == 0;
}

}  // namespace pocketslm
