#pragma once

#include <string_view>

#include "grammar/grammar.h"
#include "runner/json.h"

namespace pocketslm::grammar {

constexpr int kMaxSchemaDepth = 128;  // values in each other

// The JSON texts that a schema (draft 2020-12) allows, with little white space: behind brackets,
// commas and colons and before closing brackets, one space, or a new line and up to 20 more. Members stand in the order of the schema. Throws
// GrammarError, which names the keyword, for what is not supported.
Automaton read_json_schema(std::string_view text);
Automaton read_json_schema(const Json& schema);

}  // namespace pocketslm::grammar
