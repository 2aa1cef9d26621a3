// Which tokens of a vocabulary may come next, by a grammar.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "grammar/machine.h"
#include "grammar/token_trie.h"

namespace pocketslm::grammar {

// For one text at a time; grammar and vocabulary may be shared.
class Constraint {
 public:
  // ends: the tokens that end a text, such as EOS; allowed where the text is whole. strip: whether
  // one space that the first token begins with is no part of the text.
  Constraint(std::shared_ptr<const Automaton> automaton, std::shared_ptr<const TokenTrie> trie,
             std::vector<uint32_t> ends, bool strip);

  // The next token may be one of these; valid until the next call. Throws GrammarError where what
  // may follow costs too much to say.
  const TokenSet& mask();
  // Sets the logits of all others to minus infinity. Throws GrammarError where no token may follow.
  void apply(float* logits);
  // Goes on behind a token that may be next; false, and nothing changes, where it may not.
  bool advance(uint32_t token);
  // Begins a new text; what was learnt about the grammar stays.
  void restart();

  bool may_end() const { return machine_.accepts(state_); }
  bool must_end() const { return ended_ || machine_.ends(state_); }
  size_t count() const { return trie_->count(); }

 private:
  uint32_t behind(uint32_t token);
  bool is_end(uint32_t token) const;
  void walk(uint32_t start, size_t first, size_t last, TokenSet& set,
            const std::vector<uint8_t>* below, uint32_t most);
  void find(TokenSet& set);
  void tidy();

  std::shared_ptr<const Automaton> automaton_;
  std::shared_ptr<const TokenTrie> trie_;
  std::vector<uint32_t> ends_;
  bool strip_;
  Machine machine_;
  uint32_t state_ = Machine::kStart;
  bool first_ = true, ended_ = false;
  TokenSet mask_;
  std::vector<uint32_t> path_;  // of a walk: the state after each byte
  std::unordered_map<uint32_t, TokenSet> known_;  // by state, of masks that took long
  size_t visited_ = 0;
};

}  // namespace pocketslm::grammar
