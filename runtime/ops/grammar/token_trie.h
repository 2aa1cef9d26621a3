// The texts of a vocabulary's tokens as a tree by their bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "grammar/characters.h"

namespace pocketslm::grammar {

// Bit i of word i / 64 stands for token i.
using TokenSet = std::vector<uint64_t>;

// Safe to use from several threads.
class TokenTrie {
 public:
  // Nodes in the order of a walk: a node's children follow it, up to `end`.
  struct Node {
    uint32_t end;
    uint32_t tokens, token_count;  // those that end here, in token_ids()
    uint16_t depth;                // bytes from the root, at least 1
    uint8_t byte;
  };

  // Tokens without text, such as special ones, are in no set. Throws GrammarError where a token has
  // more than 65,535 bytes.
  explicit TokenTrie(const std::vector<std::string_view>& texts);

  size_t count() const { return texts_.size(); }
  size_t words() const { return (count() + 63) / 64; }
  std::string_view text(uint32_t token) const { return texts_[token]; }
  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<uint32_t>& token_ids() const { return token_ids_; }
  uint32_t deepest() const { return deepest_; }

  // Tokens that are whole characters of a class from its beginning on, the last perhaps in part.
  struct Within {
    static constexpr uint8_t kNever = 255;
    CharacterReader reader;
    std::vector<uint8_t> below;  // by node: characters that no token from here on needs more of
    std::vector<uint8_t> needs;  // by token: how many characters it is
    uint8_t most = 0;            // that any token needs
    // The tokens of at most `count` characters.
    const TokenSet& of_at_most(uint32_t count, size_t words) const;

   private:
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<TokenSet>> sets_;
    friend class TokenTrie;
    explicit Within(const CharacterReader& r) : reader(r), sets_(kNever) {}
  };
  // Found once for each class; null for classes of few characters, which save nothing.
  const Within* within(const CharacterReader& reader) const;

 private:
  std::vector<std::string> texts_;
  std::vector<Node> nodes_;
  std::vector<uint32_t> token_ids_;
  uint32_t deepest_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Within>> within_;
};

}  // namespace pocketslm::grammar
