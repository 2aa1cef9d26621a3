#include "sampler.h"

#include <algorithm>
#include <cmath>

namespace pocketslm {

// SplitMix64: any seed, zero too, gives a good sequence.
double Sampler::uniform() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t z = state_;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ z >> 31) >> 11) * 0x1.0p-53;
}

int32_t Sampler::pick(std::vector<float>& logits, const std::vector<int32_t>& seen,
                      size_t prompt) {
  if (const float penalty = sampling_.repetition_penalty; penalty != 1) {
    const size_t first = sampling_.penalize_prompt ? 0 : prompt;
    std::vector<int32_t> tokens(seen.begin() + static_cast<std::ptrdiff_t>(first), seen.end());
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    for (const int32_t token : tokens) {
      float& value = logits[static_cast<size_t>(token)];
      value = value < 0 ? value * penalty : value / penalty;
    }
  }
  const auto best = static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) -
                                         logits.begin());
  if (greedy()) return best;
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i)
    candidates_.emplace_back(logits[i], static_cast<int32_t>(i));
  const auto higher = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  if (sampling_.top_k && sampling_.top_k < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + sampling_.top_k, candidates_.end(),
                     higher);
    candidates_.resize(sampling_.top_k);
  }
  std::sort(candidates_.begin(), candidates_.end(), higher);
  const float top = candidates_.front().first;
  double total = 0;
  for (auto& [value, token] : candidates_) {
    value = std::exp((value - top) / sampling_.temperature);
    total += value;
  }
  // The smallest set whose probability reaches top_p; the most probable token always stays.
  double kept = 0;
  size_t count = 0;
  while (count < candidates_.size() && (count == 0 || kept < sampling_.top_p * total))
    kept += candidates_[count++].first;
  double point = uniform() * kept;
  for (size_t i = 0; i < count; ++i)
    if ((point -= candidates_[i].first) < 0) return candidates_[i].second;
  return best;
}

float log_probability(const std::vector<float>& logits, int32_t token) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float value : logits) total += std::exp(value - top);
  return logits[static_cast<size_t>(token)] - top - static_cast<float>(std::log(total));
}

}  // namespace pocketslm
