// Choosing a token from logits.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace pocketslm {

struct Sampling {
  float temperature = 0;  // 0: the most probable token
  uint32_t top_k = 0;     // 0: all
  float top_p = 1;
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const Sampling& sampling) : sampling_(sampling), state_(sampling.seed) {}
  bool greedy() const { return sampling_.temperature <= 0 || sampling_.top_k == 1; }
  int32_t pick(const std::vector<float>& logits);

 private:
  double uniform();

  Sampling sampling_;
  uint64_t state_;
  std::vector<std::pair<float, int32_t>> candidates_;
};

}  // namespace pocketslm
