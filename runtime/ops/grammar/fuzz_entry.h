// For fuzzers: bytes become a source, and what it allows is walked through.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/constraint.h"
#include "grammar/sources.h"

namespace pocketslm::grammar {

// The first byte says which notation and how to choose, the rest is the source. Never throws; ends
// the process where a mask and a token alone disagree.
inline void fuzz_one(const uint8_t* data, size_t size) {
  static const auto trie = [] {
    static const std::vector<std::string> texts = [] {
      std::vector<std::string> out;
      for (int byte = 0; byte < 256; ++byte) out.emplace_back(1, static_cast<char>(byte));
      for (const char* text : {"", "\": \"", "\"}", "\",", "true", " a", "12", "\xc3\xa9", "aaaa"})
        out.emplace_back(text);
      return out;
    }();
    return std::make_shared<TokenTrie>(std::vector<std::string_view>(texts.begin(), texts.end()));
  }();
  if (size == 0) return;
  try {
    const std::string_view source(reinterpret_cast<const char*>(data) + 1, size - 1);
    Constraint constraint(read_grammar(1 + data[0] % 3, source), trie, {256}, data[0] & 4);
    uint64_t state = data[0];
    for (int step = 0; step < 24 && !constraint.must_end(); ++step) {
      const TokenSet mask = constraint.mask();
      std::vector<uint32_t> allowed;
      for (uint32_t token = 0; token < trie->count(); ++token)
        if (mask[token / 64] >> (token % 64) & 1) allowed.push_back(token);
      if (allowed.empty()) return;
      state = state * 6364136223846793005u + 1442695040888963407u;
      const auto other = static_cast<uint32_t>((state >> 40) % trie->count());
      if (constraint.allows(other) != ((mask[other / 64] >> (other % 64) & 1) != 0)) __builtin_trap();
      if (!constraint.advance(allowed[(state >> 33) % allowed.size()])) __builtin_trap();
    }
  } catch (const GrammarError&) {
  }
}

}  // namespace pocketslm::grammar
