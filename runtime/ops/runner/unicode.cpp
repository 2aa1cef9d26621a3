#include "unicode.h"

#include <algorithm>
#include <iterator>

namespace pocketslm {
namespace {

struct Range {
  uint32_t first, last;
  CharClass kind;
};
constexpr CharClass L = CharClass::letter, N = CharClass::number, S = CharClass::space;

// Made by make_unicode_table.py.
constexpr Range kRanges[] = {
#include "unicode_table.inl"
};

}  // namespace

CharClass char_class(uint32_t code) {
  const Range* range = std::upper_bound(
      std::begin(kRanges), std::end(kRanges), code,
      [](uint32_t value, const Range& candidate) { return value < candidate.first; });
  if (range == std::begin(kRanges)) return CharClass::other;
  --range;
  return code <= range->last ? range->kind : CharClass::other;
}

}  // namespace pocketslm
