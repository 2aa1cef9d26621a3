// Choosing a token from logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace pocketslm {

struct Sampling {
  float temperature = 0;  // 0: the most probable token
  uint32_t top_k = 0;     // 0: all
  float top_p = 1;
  float min_p = 0;  // of the highest probability
  float typical_p = 1;
  uint64_t seed = 0;
  float repetition_penalty = 1;
};

class Sampler {
 public:
  explicit Sampler(const Sampling& sampling) : sampling_(sampling), state_(sampling.seed) {}
  bool greedy() const { return sampling_.temperature <= 0 || sampling_.top_k == 1; }
  // The engine's head picks the most probable token by itself, unless something makes one more so.
  bool needs_logits() const { return !greedy() || sampling_.repetition_penalty < 1; }
  float penalty() const { return sampling_.repetition_penalty; }
  // The place of one of `count` logits, which are changed where tokens of `seen` are penalized.
  int32_t pick(float* logits, size_t count, const int32_t* seen, size_t seen_count);

 private:
  double uniform();
  void weigh(const float* logits, size_t n);
  void keep_nucleus();
  void keep_typical(const float* logits);

  Sampling sampling_;
  uint64_t state_;
  std::vector<float> weights_, sorted_;  // by token; 0 where one is out
  std::vector<std::pair<float, int32_t>> candidates_;
  std::vector<std::pair<double, int32_t>> distances_;
};

// Natural log of the softmax probability of a token.
double log_probability(const std::vector<float>& logits, int32_t token);

}  // namespace pocketslm
