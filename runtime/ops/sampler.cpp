#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace pocketslm {
namespace {

// exp(x) for x <= 0, to about 10^-6. Every operation is rounded by itself, so that all machines get
// the same bits, and Python too (runtime/sampling.py).
inline float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;  // of `shifted`: its low bits are n
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

}  // namespace

// SplitMix64: any seed, zero too, gives a good sequence.
double Sampler::uniform() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t z = state_;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ z >> 31) >> 11) * 0x1.0p-53;
}

int32_t Sampler::pick(float* logits, size_t count, const int32_t* seen, size_t seen_count) {
  if (const float penalty = sampling_.repetition_penalty; penalty != 1) {
    std::vector<int32_t> tokens(seen, seen + seen_count);
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    for (const int32_t token : tokens) {
      float& value = logits[static_cast<size_t>(token)];
      value = value < 0 ? value * penalty : value / penalty;
    }
  }
  const auto best = static_cast<int32_t>(std::max_element(logits, logits + count) - logits);
  if (greedy()) return best;
  weigh(logits, count);
  if (sampling_.top_p < 1) keep_nucleus();
  if (sampling_.min_p > 0)
    for (float& weight : weights_) weight = weight < sampling_.min_p ? 0.0f : weight;
  if (sampling_.typical_p < 1) keep_typical(logits);
  // Drawn in the order of the vocabulary.
  double kept = 0;
  for (const float weight : weights_) kept += static_cast<double>(weight);
  const double point = uniform() * kept;
  double mass = 0;
  int32_t last = best;
  for (size_t i = 0; i < weights_.size(); ++i) {
    if ((mass += static_cast<double>(weights_[i])) > point) return static_cast<int32_t>(i);
    if (weights_[i] > 0) last = static_cast<int32_t>(i);
  }
  return last;
}

// The softmax without its division: the highest logit weighs 1. Of top_k, the k-th highest and
// whatever equals it stay.
void Sampler::weigh(const float* logits, size_t n) {
  const size_t k = sampling_.top_k;
  weights_.resize(n);
  float* x = weights_.data();
  for (size_t i = 0; i < n; ++i) x[i] = logits[i] / sampling_.temperature;
  float threshold = std::numeric_limits<float>::lowest();  // what is ruled out is below
  if (k && k < n) {
    sorted_ = weights_;
    const auto last = sorted_.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(sorted_.begin(), last, sorted_.end(), std::greater<>());
    threshold = std::max(threshold, *last);
  }
  const float top = *std::max_element(x, x + n);
  for (size_t i = 0; i < n; ++i) {
    const float weight = exp_of(x[i] - top);
    x[i] = x[i] < threshold ? 0.0f : weight;
  }
}

// The smallest set of the highest weights that reaches top_p of all, of equals the lower tokens
// first; the highest one always stays.
void Sampler::keep_nucleus() {
  double total = 0;
  for (const float weight : weights_) total += static_cast<double>(weight);
  const double wanted = static_cast<double>(sampling_.top_p) * total;
  // All below this are together less than what may go, so sorting is for the others.
  const auto little =
      static_cast<float>(0.5 * (total - wanted) / static_cast<double>(weights_.size()));
  candidates_.clear();
  for (size_t i = 0; i < weights_.size(); ++i)
    if (weights_[i] > 0 && !(weights_[i] < little))
      candidates_.emplace_back(weights_[i], static_cast<int32_t>(i));
  const auto lower = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first < b.first : a.second > b.second;
  };
  if (candidates_.empty()) return;
  std::make_heap(candidates_.begin(), candidates_.end(), lower);
  double mass = 0;
  size_t left = candidates_.size();
  do {
    std::pop_heap(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(left--),
                  lower);
    mass += static_cast<double>(candidates_[left].first);
  } while (left && mass < wanted);
  std::fill(weights_.begin(), weights_.end(), 0.0f);
  for (size_t i = left; i < candidates_.size(); ++i)
    weights_[static_cast<size_t>(candidates_[i].second)] = candidates_[i].first;
}

// The tokens nearest to the expected logit whose mass reaches typical_p of all, and their equals: the
// distance of a token's surprise to the entropy is that of its logit to the expected one.
void Sampler::keep_typical(const float* logits) {
  const auto scaled = [&](size_t i) { return logits[i] / sampling_.temperature; };
  double total = 0, expected = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (!(weights_[i] > 0)) continue;
    const auto weight = static_cast<double>(weights_[i]);
    total += weight;
    expected += weight * static_cast<double>(scaled(i));
  }
  expected /= total;
  distances_.clear();
  for (size_t i = 0; i < weights_.size(); ++i)
    if (weights_[i] > 0)
      distances_.emplace_back(std::abs(static_cast<double>(scaled(i)) - expected),
                              static_cast<int32_t>(i));
  if (distances_.empty()) return;
  std::make_heap(distances_.begin(), distances_.end(), std::greater<>());
  const double wanted = static_cast<double>(sampling_.typical_p) * total;
  double mass = 0;
  auto end = distances_.end();
  do {
    std::pop_heap(distances_.begin(), end--, std::greater<>());
    mass += static_cast<double>(weights_[static_cast<size_t>(end->second)]);
  } while (end != distances_.begin() && mass < wanted);
  const double farthest = end->first;
  float top = std::numeric_limits<float>::lowest();
  for (const auto& [distance, token] : distances_)
    if (distance <= farthest) top = std::max(top, scaled(static_cast<size_t>(token)));
  // The highest logit may be out: of what stays, the highest weighs 1 again.
  for (const auto& [distance, token] : distances_) {
    const auto i = static_cast<size_t>(token);
    weights_[i] = distance <= farthest ? exp_of(scaled(i) - top) : 0.0f;
  }
}

double log_probability(const std::vector<float>& logits, int32_t token) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float value : logits) total += static_cast<double>(std::exp(value - top));
  return static_cast<double>(logits[static_cast<size_t>(token)] - top) - std::log(total);
}

}  // namespace pocketslm
