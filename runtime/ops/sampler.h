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
  uint64_t seed = 0;
  float repetition_penalty = 1;  // over the prompt and what was generated, or the latter alone
  bool penalize_prompt = true;
};

class Sampler {
 public:
  explicit Sampler(const Sampling& sampling) : sampling_(sampling), state_(sampling.seed) {}
  bool greedy() const { return sampling_.temperature <= 0 || sampling_.top_k == 1; }
  // The engine's head picks the most probable token by itself, unless something makes one more so.
  bool needs_logits() const { return !greedy() || sampling_.repetition_penalty < 1; }
  float penalty() const { return sampling_.repetition_penalty; }
  // Where the tokens that are penalized begin, in a text that goes on behind a prompt.
  size_t penalized_from(size_t prompt) const { return sampling_.penalize_prompt ? 0 : prompt; }
  // A token from `logits`, which is changed where tokens from `seen` are to be penalized.
  int32_t pick(std::vector<float>& logits, const std::vector<int32_t>& seen, size_t prompt);

 private:
  double uniform();
  void weigh(const std::vector<float>& logits);
  void keep_nucleus();

  Sampling sampling_;
  uint64_t state_;
  std::vector<float> weights_, sorted_;  // by token; 0 where one is out
  std::vector<std::pair<float, int32_t>> candidates_;
};

// Natural log of the softmax probability of a token.
double log_probability(const std::vector<float>& logits, int32_t token);

}  // namespace pocketslm
