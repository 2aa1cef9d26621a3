#include "lookup.h"

#include <algorithm>
#include <utility>

namespace pocketslm {
namespace {

constexpr size_t kRetry = 16;    // a chance of so many is taken without trust
constexpr float kMemory = 0.9f;  // how much of an average one more case leaves
// The time of steps that were never measured, by tiles: one token's is 1.
constexpr float kUsual[] = {1.0f, 1.15f, 1.45f, 2.05f, 3.3f};

void follow(float& average, float value) { average += (1 - kMemory) * (value - average); }

}  // namespace

void PromptLookup::push(const int32_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    tokens_.push_back(tokens[i]);
    size_t& end = ends_[tokens[i]];
    earlier_.push_back(std::exchange(end, tokens_.size()));
  }
}

size_t PromptLookup::guess(int32_t* tokens, size_t most) {
  const size_t size = tokens_.size();
  size_t from = 0, longest = 0;  // where the most tokens stood that are those at the end
  for (size_t end = size ? earlier_[size - 1] : 0; end && longest < kLengths[kLongest];
       end = earlier_[end - 1]) {
    size_t same = 1;
    while (same < kLengths[kLongest] && same < end && tokens_[end - 1 - same] == tokens_[size - 1 - same])
      ++same;
    if (same > longest) from = end, longest = same;
  }
  if (!from) return 0;
  length_ = kLongest;
  while (kLengths[length_] > longest) --length_;
  const size_t count = std::min({kMost, most, size - from});
  std::copy_n(tokens_.data() + from, count, tokens);
  return count;
}

void PromptLookup::judge(size_t taken, size_t right) {
  for (size_t i = 0; i < std::min(right + 1, taken); ++i)
    follow(trust_[length_], i < right ? 1.0f : 0.0f);
}

bool PromptLookup::due() { return ++passed_ % kRetry == 0; }

void StepTimes::measured(size_t tokens, float nanoseconds) {
  for (size_t kind = 0; kind < kKinds; ++kind) {
    if (tokens != size_t{1} << kind) continue;
    if (ns_[kind] == 0) ns_[kind] = nanoseconds;
    follow(ns_[kind], std::min(nanoseconds, 2 * ns_[kind]));  // the machine may have been away
  }
}

float StepTimes::of(size_t tokens) const {
  float time = 0, scale = 1;
  for (size_t kind = 0; kind < kKinds; ++kind) {
    // What was not measured is usual beside what was.
    if (ns_[kind] > 0) scale = ns_[kind] / kUsual[kind];
    const float own = std::max(time, scale * kUsual[kind]);
    const size_t tile = size_t{1} << kind;
    if (tokens <= tile) {
      const float part = kind ? 2 - 2 * static_cast<float>(tokens) / static_cast<float>(tile) : 0;
      return own - part * (own - time);  // between two tiles in proportion
    }
    time = own;
  }
  return time * static_cast<float>(tokens) / 16;
}

void choose(std::vector<Chance>& chances, size_t answers, size_t tokens, size_t room,
            const StepTimes& times) {
  std::vector<float> right;  // of each text's next guess
  for (const Chance& chance : chances) right.push_back(chance.most ? chance.trust : 0);
  std::vector<Chance> tried = chances;
  float made = static_cast<float>(answers), speed = made / times.of(tokens);
  for (size_t more = 1; more <= room; ++more) {
    const auto likeliest = std::max_element(right.begin(), right.end());
    if (likeliest == right.end() || !(*likeliest > 0)) break;
    Chance& chance = tried[static_cast<size_t>(likeliest - right.begin())];
    made += *likeliest;
    *likeliest = ++chance.taken < chance.most ? *likeliest * chance.trust : 0;
    const float rate = made / times.of(tokens + more);
    if (rate > speed) speed = rate, chances = tried;
  }
}

}  // namespace pocketslm
