// Reads bytes by a grammar. What may stand at one place is a set of configurations of the automaton,
// each with its stack; each set that occurs is one state here, and what follows it by which byte is
// found once.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "grammar/grammar.h"

namespace pocketslm::grammar {

class Machine {
 public:
  static constexpr uint32_t kDead = 0, kStart = 1;

  // The automaton must outlive the machine.
  explicit Machine(const Automaton& automaton);

  // kDead where the byte may not stand there. Throws GrammarError where the grammar is so ambiguous
  // that the places cost too much.
  uint32_t next(uint32_t state, uint8_t byte) {
    const uint32_t column = automaton_.symbol_of[byte];
    const uint32_t known = rows_[size_t{state} * automaton_.symbols + column];
    return known != kUnknown ? known : step(state, byte);
  }
  bool accepts(uint32_t state) const { return states_[state].accepts; }
  // Whether nothing may follow.
  bool ends(uint32_t state) const { return states_[state].count == 0; }

  // A class of which characters may follow here, and how many of them.
  struct Run {
    uint32_t characters = kUnlimited;  // index of the class; kUnlimited: none
    uint32_t most = 0;
  };
  Run run(uint32_t state) const;

  // Forget all states but one, which gets a new number; costs less memory later.
  uint32_t restart_from(uint32_t state);
  size_t memory() const;
  uint64_t work() const { return work_; }

 private:
  static constexpr uint32_t kUnknown = ~0u, kBottom = 0;

  // Where the automaton may be: in `state`, which reads, with `count` characters of it read whole
  // and `inner` the reader's state within one.
  struct Config {
    uint32_t stack, state, count, inner;
    bool operator==(const Config& o) const {
      return stack == o.stack && state == o.state && count == o.count && inner == o.inner;
    }
    bool operator<(const Config& o) const;
  };
  // What goes on after the end of a called state; of a loop, how often it was read.
  struct Frame {
    uint32_t parent, state, count, depth;
  };
  struct Place {
    size_t first;
    uint32_t count;
    bool accepts;
  };

  uint32_t step(uint32_t state, uint8_t byte);
  void reach(const Config& from);
  void leave(const Config& config, const State& state);
  void call(uint32_t stack, uint32_t called, uint32_t state, uint32_t count);
  uint32_t frame(const Frame& frame);
  bool note(const Config& config);
  uint32_t intern();
  void forget_place();
  void spend(size_t work);

  const Automaton& automaton_;
  std::vector<uint32_t> rows_;    // by state and symbol
  std::vector<Place> states_;
  std::vector<Config> configs_;   // of all states, one after the other
  std::vector<Frame> frames_;
  std::unordered_multimap<uint64_t, uint32_t> state_index_, frame_index_;
  // Of the place that is being found:
  std::vector<Config> open_, found_;
  std::unordered_multimap<uint64_t, uint32_t> seen_index_;
  std::vector<Config> seen_;
  bool accepts_ = false;
  uint64_t work_ = 0;
};

}  // namespace pocketslm::grammar
