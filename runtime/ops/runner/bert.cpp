#include "bert.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "json.h"
#include "unicode.h"

namespace pocketslm {
namespace {

// Left out of a text, an accent, a sign, an ideograph.
enum class Kind : uint8_t { R, A, P, I, none };
constexpr Kind R = Kind::R, A = Kind::A, P = Kind::P, I = Kind::I;
struct Range {
  uint32_t first, last;
  Kind kind;
};
// Every `step`-th character of the range has its lower case `delta` on.
struct Lower {
  uint32_t first, last, step;
  int32_t delta;
};
// Made by make_unicode_table.py.
#include "bert_table.inl"

constexpr uint32_t kCapitalIWithDot = 0x130;  // the one whose lower case is two characters

template <typename T, size_t count>
const T* range_of(const T (&ranges)[count], uint32_t code) {
  const T* range = std::upper_bound(
      std::begin(ranges), std::end(ranges), code,
      [](uint32_t value, const T& candidate) { return value < candidate.first; });
  return range != std::begin(ranges) && code <= (--range)->last ? range : nullptr;
}

Kind kind_of(uint32_t code) {
  const Range* range = range_of(kRanges, code);
  return range ? range->kind : Kind::none;
}

uint32_t lower(uint32_t code) {
  const Lower* range = range_of(kLowerRuns, code);
  return range && (code - range->first) % range->step == 0 ? code + range->delta : code;
}

bool is_space(uint32_t code) { return char_class(code) == CharClass::space; }

}  // namespace

std::string bert_normalized(std::string_view text, const BertNormalization& options) {
  std::vector<uint32_t> codes;
  codes.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const uint32_t code = next_utf8(text, at);
    const Kind kind = kind_of(code);
    if (options.clean && kind == Kind::R) continue;
    const bool apart = options.ideographs && kind == Kind::I;
    if (apart) codes.push_back(' ');
    codes.push_back(options.clean && is_space(code) ? ' ' : code);
    if (apart) codes.push_back(' ');
  }
  if (options.strip_accents) codes = decomposed(codes);
  std::string out;
  out.reserve(text.size());
  for (uint32_t code : codes) {
    if (options.strip_accents && kind_of(code) == Kind::A) continue;
    if (options.lowercase && code == kCapitalIWithDot)
      out += "i\u0307";
    else
      append_utf8(out, options.lowercase ? lower(code) : code);
  }
  return out;
}

size_t bert_word_end(std::string_view text, size_t start) {
  size_t at = start;
  const uint32_t first = next_utf8(text, at);
  if (kind_of(first) == Kind::P) return at;
  const bool space = is_space(first);
  for (size_t end = at; at < text.size(); at = end) {
    const uint32_t code = next_utf8(text, end);
    if (is_space(code) != space || kind_of(code) == Kind::P) break;
  }
  return at;
}

}  // namespace pocketslm
