// Attention of every path that this CPU runs against the scalar definition: prints, for each path and
// type of cache, the largest difference of a result. Keys and values past the last position are NaN.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu.h"
#include "half.h"

using namespace pocketslm;

namespace {

std::mt19937 generator(7);

float normal() { return std::normal_distribution<float>()(generator); }

struct Case {
  size_t rows, dim, end;
  std::vector<float> queries, scales;
  std::vector<uint32_t> limits;
  std::vector<uint16_t> half[2];  // keys and values
  std::vector<int8_t> codes[2];

  Case(size_t rows, size_t dim, size_t end)
      : rows(rows), dim(dim), end(end), queries(rows * dim), limits(rows) {
    const size_t room = round_up(end, kPositionBlock);
    for (float& x : queries) x = normal() / std::sqrt(static_cast<float>(dim));
    for (uint32_t& limit : limits) limit = 1 + generator() % static_cast<uint32_t>(end);
    limits.back() = static_cast<uint32_t>(end);
    scales.assign(2 * room, NAN);
    for (auto& part : half) part.assign(room * dim, 0x7e00);
    for (auto& part : codes) part.assign(room * dim, 0);
    for (size_t p = 0; p < end; ++p) {
      scales[p] = 0.03f, scales[room + p] = 0.02f + 0.01f * static_cast<float>(p % 2);
      for (size_t d = 0; d < dim; ++d) {
        half[0][p / 16 * 16 * dim + d * 16 + p % 16] = float_to_half(normal());
        half[1][p * dim + d] = float_to_half(normal());
        codes[0][p / 16 * 16 * dim + d / 4 * 64 + p % 16 * 4 + d % 4] = code();
        codes[1][(p / 4 * dim + d) * 4 + p % 4] = code();
      }
    }
  }

  static int8_t code() { return static_cast<int8_t>(static_cast<int>(generator() % 255) - 127); }

  std::vector<float> run(const Kernels& kernels, bool int8) const {
    std::vector<float> out(rows * dim, NAN), maximum(rows, NAN), weight(rows, NAN);
    AttentionJob job{};
    job.rows = rows, job.head_dim = dim, job.end = end;
    job.queries = queries.data(), job.limits = limits.data();
    job.keys = int8 ? static_cast<const void*>(codes[0].data()) : half[0].data();
    job.values = int8 ? static_cast<const void*>(codes[1].data()) : half[1].data();
    job.key_scales = scales.data(), job.value_scales = scales.data() + scales.size() / 2;
    job.out = out.data(), job.maximum = maximum.data(), job.weight = weight.data();
    (int8 ? kernels.attend_i8 : kernels.attend_f16)(job);
    for (size_t i = 0; i < out.size(); ++i) out[i] /= weight[i / dim];
    return out;
  }
};

}  // namespace

int main() {
  for (const char* const* name = available_isa_names(); *name; ++name)
    for (const bool int8 : {false, true}) {
      generator.seed(7);
      float worst = 0;
      for (size_t rows : {1, 3, 6, 11})
        for (size_t dim : {16, 64})
          for (size_t end : {1, 18, 271}) {
            const Case at(rows, dim, end);
            const auto out = at.run(*select_kernels(*name), int8);
            const auto expected = at.run(kScalarKernels, int8);
            for (size_t i = 0; i < out.size(); ++i) {
              const float error = std::fabs(out[i] - expected[i]);
              if (!(error <= worst)) worst = error;  // NaN stays
              if (std::isnan(worst)) worst = INFINITY;
            }
          }
      std::printf("%s %s %g\n", *name, int8 ? "int8" : "fp16", static_cast<double>(worst));
    }
}
