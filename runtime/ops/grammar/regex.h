// Regular expressions over characters: parsed, written as a grammar, and combined.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "grammar/grammar.h"

namespace pocketslm::grammar {

// An expression that matches a text as a whole.
struct Pattern {
  enum class Kind : uint8_t { set, seq, alt, repeat, begin, end };  // an empty seq is no text
  Kind kind = Kind::seq;
  CodeSet set;
  std::vector<Pattern> parts;
  uint32_t min = 0, max = 0;
};

enum class Dialect {
  whole,  // the whole text; classes such as \d and their complements are those of ASCII
  search  // some part of the text, as in JSON schemas; a class is what both ECMA 262 and Python mean
};

// Throws GrammarError with what is not supported.
Pattern parse_regex(std::string_view text, Dialect dialect);

Expr write(Builder& builder, const Pattern& pattern, Writing writing);

// The texts of min to max characters that match all patterns. Throws GrammarError where the
// automaton would be too large.
Expr write_common(Builder& builder, const std::vector<Pattern>& patterns, uint32_t min,
                  uint32_t max, Writing writing);

// Reads a character after a backslash that stands for itself or for a control character, or its
// code: \n, \x41, \u0041, \u{41}. Moves `at` past it.
uint32_t read_escape(std::string_view text, size_t& at);

}  // namespace pocketslm::grammar
