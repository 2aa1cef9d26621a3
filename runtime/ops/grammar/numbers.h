// Numbers between bounds, as they are written in JSON.
#pragma once

#include <optional>
#include <string>

#include "grammar/grammar.h"

namespace pocketslm::grammar {

// A number by its digits, without needless zeros: -12.5 is {true, "12", "5"}.
struct Decimal {
  bool negative = false;
  std::string whole = "0", fraction;

  // From a JSON number. Throws GrammarError where it has more than 400 digits before or after its
  // point.
  static Decimal read(const std::string& text);
  bool is_zero() const { return whole == "0" && fraction.empty(); }
  size_t digits() const;  // from the first that is not zero on
  // Less than 0, 0 or more, as this is below, at or above the other.
  int compare(const Decimal& other) const;
};

struct Bound {
  Decimal value;
  bool exclusive = false;
};

// Whole numbers, of 30 digits at most where a side has no bound.
Expr write_integers(Builder& builder, const std::optional<Bound>& low,
                    const std::optional<Bound>& high);
// Numbers; between bounds without exponents and of 15 significant digits at most, so that readers
// which round to doubles find them within the bounds, too.
Expr write_numbers(Builder& builder, const std::optional<Bound>& low,
                   const std::optional<Bound>& high);

}  // namespace pocketslm::grammar
