#pragma once

#include <string_view>

#include "grammar/grammar.h"

namespace pocketslm::grammar {

// A grammar in llama.cpp's notation: rules `name ::= ...` of texts in quotes, classes in brackets,
// names, groups, alternatives, ? * + {n} {n,} {n,m}, and # comments; a text is what `root` matches.
// Throws GrammarError.
Automaton read_gbnf(std::string_view text);

}  // namespace pocketslm::grammar
