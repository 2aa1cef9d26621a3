#pragma once

#include <string>

namespace pocketslm::grammar {

// The expression that a whole text of a JSON schema's format matches. Throws GrammarError for formats
// that are not supported.
std::string format_expression(const std::string& name);

}  // namespace pocketslm::grammar
