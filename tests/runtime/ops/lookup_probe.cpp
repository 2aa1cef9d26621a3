// Guesses of prompt lookup, and how many of them are checked.
#include "lookup.h"

#include <cmath>
#include <cstdio>

using namespace pocketslm;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::puts(what);
  ++failures;
}

size_t taken(Chance chance, const StepTimes& times) {
  std::vector<Chance> chances{chance};
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

  PromptLookup lookup;
  expect(lookup.guess(guessed, 7) == 0, "nothing is guessed of no text");
  lookup.push(text, 11);
  expect(lookup.guess(guessed, 2) == 2 && guessed[0] == 8 && guessed[1] == 9, "what followed before");
  expect(lookup.guess(guessed, 7) == 7, "as many as there are");
  expect(taken({7, lookup.trust()}, times) > 0, "a guess is worth a try");
  for (int i = 0; i < 100; ++i) lookup.judge(7, 0);
  expect(taken({7, lookup.trust()}, times) == 0, "guesses that fail are not worth their check");
  size_t due = 0;
  for (int i = 0; i < 160; ++i) due += lookup.due();
  expect(due == 10, "one chance of sixteen is taken");
  for (int i = 0; i < 100; ++i) lookup.judge(7, 7);
  expect(taken({7, lookup.trust()}, times) == 7, "guesses that are right are all taken");

  const auto near = [](float time, float expected) { return std::abs(time - expected) < 0.1f; };
  expect(near(times.of(1), 100) && near(times.of(8), 200), "measured times are known");
  expect(times.of(2) > 101 && times.of(2) < times.of(4) && times.of(4) < 199, "others lie between");
  expect(times.of(12) > 200 && times.of(16) > times.of(12), "or are usual beside them");
  times.measured(8, 1e9f);
  expect(times.of(8) < 400, "one long pause of the machine counts little");

  // Four texts, of which one repeats what it read: the step has room for its guesses.
  std::vector<Chance> chances{{7, 0.3f}, {7, 0.95f}, {0, 0.0f}, {7, 0.2f}};
  choose(chances, 4, 4, 12, times);
  expect(chances[1].taken >= 4 && !chances[2].taken && !chances[3].taken, "the likeliest come first");
  chances.assign(16, {7, 0.95f});
  choose(chances, 16, 16, 0, times);
  for (const Chance& chance : chances) expect(!chance.taken, "there is no room for any");
  return failures;
}
