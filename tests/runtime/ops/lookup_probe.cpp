// Guesses of prompt lookup, and how many of them are checked.
#include "lookup.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <vector>

using namespace pocketslm;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::puts(what);
  ++failures;
}

size_t taken(const PromptLookup& lookup, const StepTimes& times) {
  std::vector<Chance> chances{{7, lookup.trust()}};
  choose(chances, 1, 1, 15, times);
  return chances[0].taken;
}

}  // namespace

int main() {
  const int32_t text[] = {5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7};
  int32_t guessed[PromptLookup::kMost];
  StepTimes times;
  times.measured(1, 100);
  times.measured(8, 200);

  Experience experience;
  PromptLookup lookup;
  expect(lookup.guess(guessed, 7, experience) == 0, "nothing is guessed of no text");
  lookup.read(text, 11);
  expect(lookup.guess(guessed, 2, experience) == 2 && guessed[0] == 8 && guessed[1] == 9,
         "what followed before");
  expect(lookup.guess(guessed, 7, experience) == 7 && guessed[3] == 11 && guessed[6] == 6,
         "and what followed that");
  expect(taken(lookup, times) > 0, "a guess is worth a try");
  for (int i = 0; i < 100; ++i) lookup.judge(7, 0, experience);
  lookup.guess(guessed, 7, experience);
  expect(taken(lookup, times) == 0, "guesses that fail are not worth their check");
  size_t due = 0;
  for (int i = 0; i < 160; ++i) due += lookup.due();
  expect(due == 10, "one chance of sixteen is taken");
  for (int i = 0; i < 100; ++i) lookup.judge(7, 7, experience);
  lookup.guess(guessed, 7, experience);
  expect(taken(lookup, times) == 7, "guesses that are right are all taken");

  // Two places that say the same are trusted more than one, and two that differ less.
  const auto trust_after = [](std::initializer_list<int32_t> read) {
    Experience fresh;
    PromptLookup one;
    int32_t token;
    one.read(read.begin(), read.size());
    return one.guess(&token, 1, fresh) ? one.trust()[0] : 0.0f;
  };
  const float once = trust_after({1, 2, 3, 9, 1, 2}), same = trust_after({1, 2, 3, 1, 2, 3, 1, 2});
  const float other = trust_after({1, 2, 4, 1, 2, 3, 8, 1, 2});
  expect(other > 0 && other < once && once < same, "places that agree are trusted more");

  // A text that says nothing of it is helped by what an answer before said.
  const int32_t said[] = {20, 21, 22, 23, 24, 25}, other_text[] = {30, 20, 21, 22};
  for (int turn = 0; turn < 3; ++turn) {
    PromptLookup before;
    before.read(said, 1);
    for (size_t i = 1; i < 6; ++i) before.add(said[i], experience);
  }
  PromptLookup after;
  after.read(other_text, 4);
  expect(after.guess(guessed, 7, experience) == 3 && guessed[0] == 23 && guessed[2] == 25,
         "what answers said before");
  Experience none;
  expect(after.guess(guessed, 7, none) == 0, "another session knows nothing of it");
  for (int32_t i = 1000; i < 100000; ++i) {
    const int32_t more[] = {i, i + 1, i + 2};
    experience.said(more + 3, 3, i + 3);
  }
  expect(after.guess(guessed, 7, experience) == 0, "what was said long ago is forgotten");

  const auto near = [](float time, float expected) { return std::abs(time - expected) < 0.1f; };
  expect(near(times.of(1), 100) && near(times.of(8), 200), "measured times are known");
  expect(times.of(2) > 101 && times.of(2) < times.of(4) && times.of(4) < 199, "others lie between");
  expect(times.of(12) > 200 && times.of(16) > times.of(12), "or are usual beside them");
  times.measured(8, 1e9f);
  expect(times.of(8) < 400, "one long pause of the machine counts little");

  // Four texts, of which one repeats what it read: the step has room for its guesses.
  const std::vector<float> low(7, 0.3f), high(7, 0.95f), lower(7, 0.2f);
  std::vector<Chance> chances{{7, low.data()}, {7, high.data()}, {0, nullptr}, {7, lower.data()}};
  choose(chances, 4, 4, 12, times);
  expect(chances[1].taken >= 4 && !chances[2].taken && !chances[3].taken, "the likeliest come first");
  chances.assign(16, {7, high.data()});
  choose(chances, 16, 16, 0, times);
  for (const Chance& chance : chances) expect(!chance.taken, "there is no room for any");
  return failures;
}
