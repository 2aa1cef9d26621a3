// Single kernels of a path, for tests.
#include "cpu.h"
#include "low_rank.h"

using namespace pocketslm;

extern "C" {

__attribute__((visibility("default"))) void probe_activate(const char* isa, uint32_t activation,
                                                           const float* gate, const float* up,
                                                           size_t n, float* out) {
  const Kernels& kernels = *select_kernels(isa);
  if (up)
    kernels.gated[activation](gate, up, n, out);
  else
    kernels.activate[activation](gate, n, out);
}

__attribute__((visibility("default"))) void probe_layer_norm(const char* isa, const float* x,
                                                             const float* weight,
                                                             const float* bias, size_t n,
                                                             float eps, float* out) {
  select_kernels(isa)->layer_norm(x, weight, bias, n, eps, out);
}

// lowered: ranks in whole panels of 16
__attribute__((visibility("default"))) void probe_low_rank(const char* isa, const float* a,
                                                           const float* b, size_t rank, size_t rows,
                                                           size_t cols, uint32_t rounded,
                                                           const float* x, float* lowered,
                                                           float* out) {
  const Kernels& kernels = *select_kernels(isa);
  const LowRank update = LowRank::packed(a, b, rank, rows, cols, rounded != 0);
  update.lower(kernels, x, lowered);
  update.add(kernels, lowered, 0, rows / 2, out);
  update.add(kernels, lowered, rows / 2, rows / 2, out + rows / 2);
}

__attribute__((visibility("default"))) void probe_highest(const char* isa, const float* x,
                                                          size_t blocks, float* out) {
  select_kernels(isa)->highest(x, blocks, out);
}

__attribute__((visibility("default"))) void probe_soft_cap(const char* isa, float* x, size_t n,
                                                           float cap) {
  select_kernels(isa)->soft_cap(x, n, cap);
}

__attribute__((visibility("default"))) void probe_attend(const char* isa, const AttentionJob* job) {
  const Kernels& kernels = *select_kernels(isa);
  (job->key_scales ? kernels.attend_i8 : kernels.attend_f16)(*job);
}
}
