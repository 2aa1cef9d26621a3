// Guesses what follows a text: what stood in it before after the same tokens, as answers about a text
// repeat it, or what the session's answers said after them. Several tokens are checked in less time than
// they are made one by one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <unordered_map>
#include <vector>

namespace pocketslm {

// A token that may come next, and the kind of place where it was found.
struct Guess {
  int32_t token;
  size_t kind;
};

// What the answers of a session said, and how often guesses of each kind were right in it.
class Experience {
 public:
  static constexpr size_t kLengths[] = {1, 2, 3, 4, 6};  // tokens that are the same in a text
  enum Places { kOne, kSame, kOther, kPlaces };  // what follows at the last two places of such a length
  static constexpr size_t kOrders[] = {2, 3};    // tokens that are the same in answers before
  static constexpr size_t kMostTimes = 4;
  static constexpr size_t kInText = std::size(kLengths) * kPlaces;
  static constexpr size_t kKinds = kInText + std::size(kOrders) * kMostTimes;

  // `token` came in an answer behind the `known` tokens that end at `end`.
  void said(const int32_t* end, size_t known, int32_t token);
  // What was said behind those that end there, of which `known` are known.
  std::optional<Guess> after(const int32_t* end, size_t known) const;
  // The part of the guesses of a kind that is right, if all before them are.
  float trust(size_t kind) const { return trust_[kind]; }
  void judge(size_t kind, bool right);

 private:
  static constexpr size_t kEntries = 8192;  // of each order; what was said long ago is forgotten
  struct Entry {
    uint32_t context;  // a hash of the tokens
    int32_t token;
    uint32_t times;  // it was said more often than others, up to kMostTimes; 0: nothing was
  };
  struct Place {
    uint32_t context;
    size_t entry;
  };
  static Place place(const int32_t* end, size_t order);

  std::vector<Entry> said_[std::size(kOrders)];
  // By kind, as other articles and chats than those of the documentation's figures begin.
  std::array<float, kKinds> trust_ = {0.24f, 0.52f, 0.10f, 0.40f, 0.75f, 0.35f, 0.50f, 0.80f,
                                      0.35f, 0.65f, 0.90f, 0.45f, 0.80f, 0.97f, 0.50f,  // in a text
                                      0.10f, 0.20f, 0.50f, 0.75f,   // after two tokens
                                      0.12f, 0.50f, 0.65f, 0.93f};  // after three
};

// The guesses for one text.
class PromptLookup {
 public:
  static constexpr size_t kMost = 7;  // guesses: with the token before them a tile of 8

  // What the text begins with.
  void read(const int32_t* tokens, size_t count);
  // The next token of its answer.
  void add(int32_t token, Experience& experience);
  // Writes at most `most` tokens that may follow; how many.
  size_t guess(int32_t* tokens, size_t most, const Experience& experience);
  // How likely each of them is right if all before it are.
  const float* trust() const { return trust_; }
  // How many of the first `taken` of the last guesses were right; `taken` may be 0.
  void judge(size_t taken, size_t right, Experience& experience) const;
  // Whether guesses that do not pay off by their trust are due to be tried again.
  bool due();

 private:
  std::optional<Guess> find(const int32_t* end, size_t known) const;

  std::vector<int32_t> tokens_;
  std::vector<size_t> earlier_;                // the end of the same token before, or 0
  std::unordered_map<int32_t, size_t> ends_;  // of each token, where it stood last
  size_t kinds_[kMost] = {};                   // of the last guesses
  float trust_[kMost] = {};
  size_t passed_ = 0;  // chances that were not taken
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
  size_t most;         // of them there are
  const float* trust;  // how likely each is right if all before it are
  size_t taken = 0;    // receives how many are worth it
};
// Chooses the guesses with the most tokens a second. `answers`: texts whose next token is made, guessed
// or not; `tokens`: of the step without guesses; `room`: guesses that it has room for.
void choose(std::vector<Chance>& chances, size_t answers, size_t tokens, size_t room,
            const StepTimes& times);

}  // namespace pocketslm
