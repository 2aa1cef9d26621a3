// Single kernels of a path, for tests.
#include "cpu.h"

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

__attribute__((visibility("default"))) void probe_soft_cap(const char* isa, float* x, size_t n,
                                                           float cap) {
  select_kernels(isa)->soft_cap(x, n, cap);
}

__attribute__((visibility("default"))) void probe_attend(const char* isa, const AttentionJob* job) {
  const Kernels& kernels = *select_kernels(isa);
  (job->key_scales ? kernels.attend_i8 : kernels.attend_f16)(*job);
}
}
