// AVX-VNNI, as Intel's N100 and its kind have it without AVX-512: vpdpbusd in 256 bits.
#include <immintrin.h>

#include "kernels.h"

namespace pocketslm {
namespace {

constexpr bool kWideDots = true;

// Adds the sums of four products of unsigned and signed bytes.
inline __m256i add_dots(__m256i acc, __m256i factors, __m256i codes) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, factors, codes);
#else
  return _mm256_dpbusd_epi32(acc, factors, codes);
#endif
}

#include "kernels_ymm.inl"

}  // namespace

// With other flags this file is the same code in AVX-512's encoding, which tests run where there is
// no AVX-VNNI.
#ifdef __AVXVNNI__
const bool kAvxVnniIsEvex = false;
#else
const bool kAvxVnniIsEvex = true;
#endif
const Kernels kAvxVnniKernels = POCKETSLM_KERNELS("avx_vnni");

}  // namespace pocketslm
