// The character classes and the normalization that tokenizers ask for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace pocketslm {

enum class CharClass : uint8_t { other, letter, number, space };

CharClass char_class(uint32_t code);

// Canonical composition (NFC) of UTF-8 text.
std::string to_nfc(std::string_view text);

}  // namespace pocketslm
