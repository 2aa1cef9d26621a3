// Prompt lookup: guesses what follows from where most of the last tokens stood before. Answers about a
// text repeat it, and several tokens are checked in less time than they are made one by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace pocketslm {

class PromptLookup {
 public:
  static constexpr size_t kMost = 7;  // guesses: with the token before them a tile of 8

  void push(const int32_t* tokens, size_t count);
  // Writes at most `most` tokens that may follow; how many.
  size_t guess(int32_t* tokens, size_t most);
  // The part of such guesses that is right, of each if all before it are.
  float trust() const { return trust_[length_]; }
  // How many of the first `taken` of the last guesses were right; `taken` may be 0.
  void judge(size_t taken, size_t right);
  // Whether guesses that do not pay off by their trust are due to be tried again.
  bool due();

 private:
  static constexpr size_t kLengths[] = {1, 2, 3, 4, 6};  // the more are the same, the likelier the next
  static constexpr size_t kLongest = 4;                  // the place of the last of them

  std::vector<int32_t> tokens_;
  std::vector<size_t> earlier_;                // the end of the same token before, or 0
  std::unordered_map<int32_t, size_t> ends_;  // of each token, where it stood last
  float trust_[kLongest + 1] = {0.3f, 0.6f, 0.7f, 0.8f, 0.85f};  // by length
  size_t length_ = 0;                           // of the last guesses
  size_t passed_ = 0;                           // chances that were not taken
};

// What steps of a session take, by their tokens, as measured on the way.
class StepTimes {
 public:
  void measured(size_t tokens, float nanoseconds);
  // In no unit of its own: it is to be compared.
  float of(size_t tokens) const;

 private:
  static constexpr size_t kKinds = 5;  // 1, 2, 4, 8 and 16 tokens, which fill a tile
  float ns_[kKinds] = {};              // 0: not measured yet
};

// Guesses that a text has for a step.
struct Chance {
  size_t most;       // of them there are
  float trust;       // how likely each is right if all before it are
  size_t taken = 0;  // receives how many are worth it
};
// Chooses the guesses with the most tokens a second. `answers`: texts whose next token is made, guessed
// or not; `tokens`: of the step without guesses; `room`: guesses that it has room for.
void choose(std::vector<Chance>& chances, size_t answers, size_t tokens, size_t room,
            const StepTimes& times);

}  // namespace pocketslm
