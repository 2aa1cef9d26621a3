// Constraints behind the C border.
#include <algorithm>
#include <limits>
#include <memory>
#include <string>

#include "border.h"
#include "grammar/held.h"
#include "grammar/sources.h"

using namespace pocketslm;
using namespace pocketslm::grammar;

struct pslm_vocabulary {
  std::shared_ptr<const TokenTrie> trie;
  std::vector<uint32_t> ends;
  bool strip;
};
struct pslm_grammar {
  std::shared_ptr<const Automaton> automaton;
};

namespace {

template <typename F>
pslm_status checked(pslm_error error, F&& f) {
  return guarded(error, [&] {
    try {
      return f();
    } catch (const GrammarError& failure) {
      return report(error, PSLM_ERROR_GRAMMAR, failure.what());
    }
  });
}

pslm_status null_argument(pslm_error error) {
  return report(error, PSLM_ERROR_ARGUMENT, "null argument");
}

}  // namespace

pslm_status pslm_vocabulary_open(const char* bytes, const uint64_t* offsets, size_t count,
                                 const int32_t* ends, size_t end_count, uint32_t strip,
                                 pslm_vocabulary** vocabulary, pslm_error error) {
  if (!vocabulary || !offsets || (end_count && !ends)) return null_argument(error);
  *vocabulary = nullptr;
  if (count == 0 || count > size_t{std::numeric_limits<int32_t>::max()})
    return report(error, PSLM_ERROR_ARGUMENT, "a vocabulary of no tokens, or of too many");
  for (size_t i = 0; i < count; ++i)
    if (offsets[i] > offsets[i + 1])
      return report(error, PSLM_ERROR_ARGUMENT, "the offsets of tokens do not ascend");
  if (!bytes && offsets[count]) return null_argument(error);
  for (size_t i = 0; i < end_count; ++i)
    if (static_cast<uint32_t>(ends[i]) >= count)
      return report(error, PSLM_ERROR_ARGUMENT,
                    "the end token " + std::to_string(ends[i]) + " is outside the vocabulary of " +
                        std::to_string(count));
  return checked(error, [&] {
    std::vector<std::string_view> texts;
    texts.reserve(count);
    for (size_t i = 0; i < count; ++i)
      texts.emplace_back(bytes + offsets[i], offsets[i + 1] - offsets[i]);
    *vocabulary = new pslm_vocabulary{std::make_shared<TokenTrie>(texts),
                                      {ends, ends + end_count}, strip != 0};
    return PSLM_OK;
  });
}

void pslm_vocabulary_close(pslm_vocabulary* vocabulary) { delete vocabulary; }

pslm_status pslm_grammar_open(uint32_t kind, const char* text, size_t bytes, pslm_grammar** grammar,
                              pslm_error error) {
  if (!grammar || (bytes && !text)) return null_argument(error);
  *grammar = nullptr;
  return checked(error, [&] {
    const auto automaton = read_grammar(kind, {text, bytes});
    *grammar = new pslm_grammar{automaton};
    return PSLM_OK;
  });
}

void pslm_grammar_close(pslm_grammar* grammar) { delete grammar; }

pslm_status pslm_constraint_open(const pslm_grammar* grammar, const pslm_vocabulary* vocabulary,
                                 pslm_constraint** constraint, pslm_error error) {
  if (!grammar || !vocabulary || !constraint) return null_argument(error);
  *constraint = nullptr;
  return checked(error, [&] {
    *constraint = new pslm_constraint{
        {grammar->automaton, vocabulary->trie, vocabulary->ends, vocabulary->strip}};
    return PSLM_OK;
  });
}

void pslm_constraint_close(pslm_constraint* constraint) { delete constraint; }

void pslm_constraint_restart(pslm_constraint* constraint) {
  if (constraint) constraint->constraint.restart();
}

pslm_status pslm_constraint_apply(pslm_constraint* constraint, float* logits, size_t count,
                                  pslm_error error) {
  if (!constraint || !logits) return null_argument(error);
  const size_t known = constraint->constraint.count();
  if (count < known)
    return report(error, PSLM_ERROR_ARGUMENT,
                  std::to_string(count) + " logits for a vocabulary of " + std::to_string(known));
  return checked(error, [&] {
    constraint->constraint.apply(logits);
    std::fill(logits + known, logits + count, -std::numeric_limits<float>::infinity());
    return PSLM_OK;
  });
}

pslm_status pslm_constraint_mask(pslm_constraint* constraint, uint64_t* words, size_t count,
                                 pslm_error error) {
  if (!constraint || !words) return null_argument(error);
  return checked(error, [&] {
    const TokenSet& mask = constraint->constraint.mask();
    if (count < mask.size())
      return report(error, PSLM_ERROR_ARGUMENT,
                    "no room for " + std::to_string(mask.size()) + " words, only for " +
                        std::to_string(count));
    std::copy(mask.begin(), mask.end(), words);
    std::fill(words + mask.size(), words + count, 0);
    return PSLM_OK;
  });
}

pslm_status pslm_constraint_advance(pslm_constraint* constraint, int32_t token, pslm_error error) {
  if (!constraint) return null_argument(error);
  return checked(error, [&] {
    if (constraint->constraint.advance(static_cast<uint32_t>(token))) return PSLM_OK;
    return report(error, PSLM_ERROR_ARGUMENT,
                  "token " + std::to_string(token) + " may not follow this text");
  });
}

uint32_t pslm_constraint_state(const pslm_constraint* constraint) {
  if (!constraint) return 0;
  uint32_t state = 0;
  if (constraint->constraint.may_end()) state |= PSLM_TEXT_MAY_END;
  if (constraint->constraint.must_end()) state |= PSLM_TEXT_MUST_END;
  return state;
}
