// A grammar from any of the notations.
#pragma once

#include <memory>
#include <string_view>

#include "grammar/gbnf.h"
#include "grammar/json_schema.h"
#include "grammar/regex.h"
#include "pocketslm.h"

namespace pocketslm::grammar {

// kind: of pslm_grammar_kind. Throws GrammarError.
inline std::shared_ptr<const Automaton> read_grammar(uint32_t kind, std::string_view text) {
  switch (kind) {
    case PSLM_GRAMMAR_JSON_SCHEMA: return std::make_shared<Automaton>(read_json_schema(text));
    case PSLM_GRAMMAR_GBNF: return std::make_shared<Automaton>(read_gbnf(text));
    case PSLM_GRAMMAR_REGEX: {
      Builder builder;
      const Expr root = write(builder, parse_regex(text, Dialect::whole), Writing::plain);
      return std::make_shared<Automaton>(builder.build(root, "the expression"));
    }
    default: throw GrammarError("an unknown kind of grammar");
  }
}

}  // namespace pocketslm::grammar
