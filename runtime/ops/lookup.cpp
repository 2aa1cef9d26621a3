#include "lookup.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace pocketslm {
namespace {

constexpr size_t kRetry = 16;    // a chance of so many is taken without trust
constexpr float kMemory = 0.9f;  // how much of an average one more case leaves
constexpr float kTrustMemory = 0.95f;
// The time of steps that were never measured, by tiles: one token's is 1.
constexpr float kUsual[] = {1.0f, 1.15f, 1.45f, 2.05f, 3.3f};
constexpr size_t kLongest = std::size(Experience::kLengths) - 1;  // the place of the longest

void follow(float& average, float value, float memory = kMemory) {
  average += (1 - memory) * (value - average);
}

}  // namespace

Experience::Place Experience::place(const int32_t* end, size_t order) {
  uint64_t hash = 0;
  for (size_t i = 1; i <= order; ++i)
    hash = (hash ^ static_cast<uint32_t>(end[-static_cast<ptrdiff_t>(i)])) * 0x9E3779B97F4A7C15u;
  return {static_cast<uint32_t>(hash >> 32), static_cast<size_t>(hash >> 16) % kEntries};
}

void Experience::said(const int32_t* end, size_t known, int32_t token) {
  for (size_t i = 0; i < std::size(kOrders) && kOrders[i] <= known; ++i) {
    if (said_[i].empty()) said_[i].resize(kEntries);
    const auto [context, at] = place(end, kOrders[i]);
    Entry& entry = said_[i][at];
    if (!entry.times || entry.context != context)
      entry = {context, token, 1};
    else if (entry.token == token)
      entry.times += entry.times < kMostTimes;
    else if (entry.times > 1)
      --entry.times;
    else
      entry.token = token;
  }
}

std::optional<Guess> Experience::after(const int32_t* end, size_t known) const {
  for (size_t i = std::size(kOrders); i-- > 0;) {
    if (kOrders[i] > known || said_[i].empty()) continue;
    const auto [context, at] = place(end, kOrders[i]);
    const Entry& entry = said_[i][at];
    if (entry.times && entry.context == context)
      return Guess{entry.token, kInText + i * kMostTimes + entry.times - 1};
  }
  return std::nullopt;
}

void Experience::judge(size_t kind, bool right) {
  follow(trust_[kind], right ? 1.0f : 0.0f, kTrustMemory);
}

void PromptLookup::read(const int32_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    tokens_.push_back(tokens[i]);
    size_t& end = ends_[tokens[i]];
    earlier_.push_back(std::exchange(end, tokens_.size()));
  }
}

void PromptLookup::add(int32_t token, Experience& experience) {
  experience.said(tokens_.data() + tokens_.size(), tokens_.size(), token);
  read(&token, 1);
}

// Where most of the tokens before `end` stood last, and whether the place before it says the same.
std::optional<Guess> PromptLookup::find(const int32_t* end, size_t known) const {
  const auto last = ends_.find(end[-1]);
  if (last == ends_.end()) return std::nullopt;
  std::optional<Guess> found;
  size_t longest = 0, places = Experience::kOne;
  for (size_t at = last->second; at; at = earlier_[at - 1]) {
    if (at == tokens_.size()) continue;  // nothing follows yet
    size_t same = 1;
    const size_t most = std::min({Experience::kLengths[kLongest], known, at});
    while (same < most && tokens_[at - 1 - same] == end[-1 - static_cast<ptrdiff_t>(same)]) ++same;
    size_t length = kLongest;
    while (Experience::kLengths[length] > same) --length;
    if (!found || length > longest) {
      found = {tokens_[at], 0}, longest = length, places = Experience::kOne;
    } else if (length == longest && places == Experience::kOne) {
      places = tokens_[at] == found->token ? Experience::kSame : Experience::kOther;
      if (length == kLongest) break;
    }
  }
  if (found) found->kind = longest * Experience::kPlaces + places;
  return found;
}

size_t PromptLookup::guess(int32_t* tokens, size_t most, const Experience& experience) {
  constexpr size_t kBefore = Experience::kLengths[kLongest];
  int32_t window[kBefore + kMost];  // the last tokens, and the guesses behind them
  size_t known = std::min(kBefore, tokens_.size());
  std::copy_n(tokens_.end() - static_cast<ptrdiff_t>(known), known, window);
  size_t count = 0;
  for (; known && count < std::min(most, kMost); ++count) {
    const std::optional<Guess> said = experience.after(window + known, known);
    std::optional<Guess> best = find(window + known, known);
    if (!best || (said && experience.trust(said->kind) > experience.trust(best->kind))) best = said;
    if (!best) break;
    kinds_[count] = best->kind, trust_[count] = experience.trust(best->kind);
    window[known++] = tokens[count] = best->token;
  }
  return count;
}

void PromptLookup::judge(size_t taken, size_t right, Experience& experience) const {
  for (size_t i = 0; i < std::min(right + 1, taken); ++i) experience.judge(kinds_[i], i < right);
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
  for (const Chance& chance : chances) right.push_back(chance.most ? *chance.trust : 0);
  std::vector<Chance> tried = chances;
  float made = static_cast<float>(answers), speed = made / times.of(tokens);
  for (size_t more = 1; more <= room; ++more) {
    const auto likeliest = std::max_element(right.begin(), right.end());
    if (likeliest == right.end() || !(*likeliest > 0)) break;
    Chance& chance = tried[static_cast<size_t>(likeliest - right.begin())];
    made += *likeliest;
    const bool more_follow = ++chance.taken < chance.most;
    *likeliest = more_follow ? *likeliest * chance.trust[chance.taken] : 0;
    const float rate = made / times.of(tokens + more);
    if (rate > speed) speed = rate, chances = tried;
  }
}

}  // namespace pocketslm
