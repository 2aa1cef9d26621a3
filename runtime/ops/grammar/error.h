#pragma once

#include <stdexcept>

namespace pocketslm::grammar {

// What is wrong with a schema, an expression or a grammar, in one line.
struct GrammarError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace pocketslm::grammar
