#include "lookup.h"

#include <algorithm>

namespace pocketslm {
namespace {

constexpr size_t kTakes[] = {0, 1, 3, 7};  // guesses that fill a tile with the token before them
constexpr size_t kRetry = 16;              // a chance of so many is taken without trust
constexpr float kMemory = 0.9f;            // how much of an average one more case leaves

void follow(float& average, float value) { average += (1 - kMemory) * (value - average); }

}  // namespace

uint64_t PromptLookup::key(size_t end) const {
  uint64_t key = 0;
  for (size_t i = end - kWidth; i < end; ++i)
    key = (key ^ static_cast<uint32_t>(tokens_[i])) * 0x9e3779b97f4a7c15u;
  return key;
}

void PromptLookup::push(const int32_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    // What ends here is found once something follows it.
    if (tokens_.size() >= kWidth) ends_[key(tokens_.size())] = tokens_.size();
    tokens_.push_back(tokens[i]);
  }
}

// The number of guesses with the most tokens a second, where each is right with this probability if
// all before it are.
size_t PromptLookup::worth(float trust) const {
  size_t best = 0;
  float speed = 0;
  for (const size_t takes : kTakes) {
    float tokens = 1, right = 1;
    for (size_t i = 0; i < takes; ++i) tokens += right *= trust;
    const float rate = tokens / (1 + extra_ * static_cast<float>(takes));
    if (rate > speed) best = takes, speed = rate;
  }
  return best;
}

size_t PromptLookup::guess(int32_t* tokens, size_t most) {
  asked_ = Clock::now();
  guessed_ = 0;
  if (tokens_.size() < kWidth) return 0;
  const auto found = ends_.find(key(tokens_.size()));
  if (found == ends_.end()) return 0;
  const size_t from = found->second, size = tokens_.size();
  size_t same = 0;  // tokens before it that are those at the end
  while (same < kLengths[3] && same < from && tokens_[from - 1 - same] == tokens_[size - 1 - same])
    ++same;
  if (same < kWidth) return 0;  // another text with the same key
  length_ = 3;
  while (kLengths[length_] > same) --length_;
  size_t takes = worth(trust_[length_]);
  if (!takes && ++passed_ % kRetry == 0) takes = 1;
  guessed_ = std::min({takes, most, size - from});
  std::copy_n(tokens_.data() + from, guessed_, tokens);
  return guessed_;
}

void PromptLookup::judge(size_t right) {
  const std::chrono::duration<float, std::nano> took = Clock::now() - asked_;
  if (!guessed_) {
    if (step_ns_ == 0) step_ns_ = took.count();
    return follow(step_ns_, took.count());
  }
  if (step_ns_ > 0) {
    const float extra = (took.count() / step_ns_ - 1) / static_cast<float>(guessed_);
    follow(extra_, std::clamp(extra, 0.03f, 0.6f));
  }
  for (size_t i = 0; i < std::min(right + 1, guessed_); ++i)
    follow(trust_[length_], i < right ? 1.0f : 0.0f);
}

}  // namespace pocketslm
