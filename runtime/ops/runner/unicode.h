// The character classes and the normalization that tokenizers ask for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace pocketslm {

// `letter`: one that has no case. `sign`: punctuation and symbols.
enum class CharClass : uint8_t { other, upper, lower, letter, mark, number, sign, space };

CharClass char_class(uint32_t code);

// Sets of classes.
using Classes = uint32_t;
constexpr Classes one(CharClass kind) { return 1u << static_cast<uint32_t>(kind); }
constexpr Classes kLetters = one(CharClass::upper) | one(CharClass::lower) | one(CharClass::letter);
constexpr Classes kMarks = one(CharClass::mark), kNumbers = one(CharClass::number);
constexpr Classes kSpaces = one(CharClass::space);

// Canonical decomposition (NFD) of code points.
std::vector<uint32_t> decomposed(const std::vector<uint32_t>& text);

// Canonical composition (NFC) of UTF-8 text.
std::string to_nfc(std::string_view text);

}  // namespace pocketslm
