// Prompt lookup: guesses what follows from where the last tokens stood before. Answers about a text
// repeat it, and several tokens are checked in less time than they are made one by one.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace pocketslm {

class PromptLookup {
 public:
  static constexpr size_t kMost = 7;  // guesses: with the token before them a tile of 8

  void push(const int32_t* tokens, size_t count);
  // At most `most` tokens that may follow; as many as promise the most tokens a second, often none.
  size_t guess(int32_t* tokens, size_t most);
  // How many of the last guesses, also of none, were right. The time since then is what their check
  // took.
  void judge(size_t right);

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr size_t kWidth = 2;  // tokens that must be the same
  static constexpr size_t kLengths[] = {2, 3, 4, 6};  // the more are the same, the likelier the next
  uint64_t key(size_t end) const;
  size_t worth(float trust) const;

  std::vector<int32_t> tokens_;
  std::unordered_map<uint64_t, size_t> ends_;  // by the last tokens before it
  float trust_[4] = {0.6f, 0.7f, 0.8f, 0.85f};  // the part of guesses that is right, by length
  size_t length_ = 0, guessed_ = 0;             // of the last guesses
  size_t passed_ = 0;                           // chances that were not taken
  Clock::time_point asked_{};
  float step_ns_ = 0, extra_ = 0.15f;  // one token's time; of it, what a guess adds
};

}  // namespace pocketslm
