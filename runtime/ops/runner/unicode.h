// The character classes that pre-tokenizers ask for.
#pragma once

#include <cstdint>

namespace pocketslm {

enum class CharClass : uint8_t { other, letter, number, space };

CharClass char_class(uint32_t code);

}  // namespace pocketslm
