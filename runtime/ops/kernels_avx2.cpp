// AVX2 with FMA and F16C: vpmaddubsw on codes times activations.
#include <immintrin.h>

#include "kernels.h"

namespace pocketslm {
namespace {

constexpr bool kWideDots = false;

// Adds the sums of four products of unsigned and signed bytes. Two of them must fit 16 bits.
inline __m256i add_dots(__m256i acc, __m256i factors, __m256i codes) {
  const __m256i pairs = _mm256_maddubs_epi16(factors, codes);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "kernels_ymm.inl"

}  // namespace

const Kernels kAvx2Kernels = POCKETSLM_KERNELS("avx2");

}  // namespace pocketslm
