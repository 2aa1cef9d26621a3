#include "unicode.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>
#include <vector>

#include "json.h"

namespace pocketslm {
namespace {

// A canonical decomposition; `second` is 0 for one character. Not all of them compose again.
struct Decomposition {
  uint32_t code, first, second = 0, composes = 0;
};
struct Combining {
  uint32_t first, last;
  uint8_t order;  // canonical combining class
};
#include "normalization_table.inl"

// Hangul syllables are composed by arithmetic.
constexpr uint32_t kSyllables = 0xac00, kLeads = 0x1100, kVowels = 0x1161, kTails = 0x11a7;
constexpr uint32_t kLeadCount = 19, kVowelCount = 21, kTailCount = 28;
constexpr uint32_t kSyllableCount = kLeadCount * kVowelCount * kTailCount;

uint8_t combining_order(uint32_t code) {
  const Combining* range = std::upper_bound(
      std::begin(kCombining), std::end(kCombining), code,
      [](uint32_t value, const Combining& candidate) { return value < candidate.first; });
  if (range == std::begin(kCombining)) return 0;
  --range;
  return code <= range->last ? range->order : 0;
}

void decompose(uint32_t code, std::vector<uint32_t>& out) {
  if (const uint32_t index = code - kSyllables; index < kSyllableCount) {
    out.push_back(kLeads + index / (kVowelCount * kTailCount));
    out.push_back(kVowels + index / kTailCount % kVowelCount);
    if (index % kTailCount) out.push_back(kTails + index % kTailCount);
    return;
  }
  const Decomposition* found = std::lower_bound(
      std::begin(kDecompositions), std::end(kDecompositions), code,
      [](const Decomposition& candidate, uint32_t value) { return candidate.code < value; });
  if (found == std::end(kDecompositions) || found->code != code) {
    out.push_back(code);
    return;
  }
  decompose(found->first, out);
  if (found->second) decompose(found->second, out);
}

// The character that the two make, or 0.
uint32_t compose(uint32_t first, uint32_t second) {
  if (first - kLeads < kLeadCount && second - kVowels < kVowelCount)
    return kSyllables + ((first - kLeads) * kVowelCount + second - kVowels) * kTailCount;
  if (const uint32_t index = first - kSyllables;
      index < kSyllableCount && index % kTailCount == 0 && second - kTails - 1 < kTailCount - 1)
    return first + second - kTails;
  using Pair = std::pair<uint64_t, uint32_t>;
  static const std::vector<Pair> pairs = [] {
    std::vector<Pair> made;
    for (const Decomposition& d : kDecompositions)
      if (d.composes) made.emplace_back(uint64_t{d.first} << 32 | d.second, d.code);
    std::sort(made.begin(), made.end());
    return made;
  }();
  const uint64_t key = uint64_t{first} << 32 | second;
  const auto found = std::lower_bound(pairs.begin(), pairs.end(), Pair{key, 0});
  return found != pairs.end() && found->first == key ? found->second : 0;
}

}  // namespace

std::vector<uint32_t> decomposed(const std::vector<uint32_t>& text) {
  std::vector<uint32_t> codes;
  codes.reserve(text.size());
  for (uint32_t code : text) decompose(code, codes);
  for (auto at = codes.begin(); at != codes.end();) {
    auto end = at + 1;
    while (end != codes.end() && combining_order(*end)) ++end;
    std::stable_sort(combining_order(*at) ? at : at + 1, end, [](uint32_t a, uint32_t b) {
      return combining_order(a) < combining_order(b);
    });
    at = end;
  }
  return codes;
}

std::string to_nfc(std::string_view text) {
  // Below U+0300 nothing combines and nothing but composed characters stands.
  if (std::all_of(text.begin(), text.end(),
                  [](char c) { return static_cast<unsigned char>(c) < 0xcc; }))
    return std::string(text);
  std::vector<uint32_t> codes;
  for (size_t at = 0; at < text.size();) codes.push_back(next_utf8(text, at));
  codes = decomposed(codes);
  std::vector<uint32_t> composed;
  size_t starter = SIZE_MAX;
  int last_order = -1;  // of what was kept since the starter; -1: nothing
  for (uint32_t code : codes) {
    const int order = combining_order(code);
    if (starter != SIZE_MAX && last_order < order)
      if (const uint32_t made = compose(composed[starter], code)) {
        composed[starter] = made;
        continue;
      }
    if (order == 0) {
      starter = composed.size();
      last_order = -1;
    } else {
      last_order = order;
    }
    composed.push_back(code);
  }
  std::string out;
  for (uint32_t code : composed) append_utf8(out, code);
  return out;
}

namespace {

CharClass look_up(uint32_t code) {
  // Classes, and runs in which upper and lower case take turns.
  enum class Kind : uint8_t { U, l, L, M, N, P, S, E, O };
  struct Range {
    uint32_t first, last;
    Kind kind;
  };
  constexpr Kind U = Kind::U, l = Kind::l, L = Kind::L, M = Kind::M, N = Kind::N, P = Kind::P,
                 S = Kind::S, E = Kind::E, O = Kind::O;
  // Made by make_unicode_table.py.
  static constexpr Range kRanges[] = {
#include "unicode_table.inl"
  };
  const Range* range = std::upper_bound(
      std::begin(kRanges), std::end(kRanges), code,
      [](uint32_t value, const Range& candidate) { return value < candidate.first; });
  if (range == std::begin(kRanges) || code > (--range)->last) return CharClass::other;
  switch (range->kind) {
    case Kind::U:
      return CharClass::upper;
    case Kind::l:
      return CharClass::lower;
    case Kind::L:
      return CharClass::letter;
    case Kind::M:
      return CharClass::mark;
    case Kind::N:
      return CharClass::number;
    case Kind::P:
      return CharClass::sign;
    case Kind::S:
      return CharClass::space;
    case Kind::E:
      return code % 2 == 0 ? CharClass::upper : CharClass::lower;
    case Kind::O:
      return code % 2 == 1 ? CharClass::upper : CharClass::lower;
  }
  return CharClass::other;
}

}  // namespace

CharClass char_class(uint32_t code) {
  static const auto ascii = [] {
    std::array<CharClass, 0x80> classes;
    for (uint32_t i = 0; i < classes.size(); ++i) classes[i] = look_up(i);
    return classes;
  }();
  return code < ascii.size() ? ascii[code] : look_up(code);
}

}  // namespace pocketslm
