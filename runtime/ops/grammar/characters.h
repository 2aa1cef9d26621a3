// Sets of characters, and the automata that read one of their characters from bytes.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace pocketslm::grammar {

using ByteSet = std::bitset<256>;

// Code points as ascending ranges that do not touch; surrogates are never among them.
class CodeSet {
 public:
  static constexpr uint32_t kLast = 0x10ffff;

  CodeSet() = default;
  CodeSet(std::initializer_list<std::pair<uint32_t, uint32_t>> ranges);
  static CodeSet all() { return {{0, kLast}}; }
  static CodeSet of(std::string_view ascii);

  void add(uint32_t first, uint32_t last);
  void add(const CodeSet& other);
  CodeSet without(const CodeSet& other) const;
  CodeSet common(const CodeSet& other) const;
  CodeSet complement() const { return all().without(*this); }
  bool contains(uint32_t code) const;
  bool empty() const { return ranges_.empty(); }
  const std::vector<std::pair<uint32_t, uint32_t>>& ranges() const { return ranges_; }
  bool operator==(const CodeSet& other) const { return ranges_ == other.ranges_; }
  bool operator<(const CodeSet& other) const { return ranges_ < other.ranges_; }

 private:
  std::vector<std::pair<uint32_t, uint32_t>> ranges_;
};

// How characters are written in the text: as UTF-8, or within a JSON string, where some are escaped.
enum class Writing { plain, json };

// The ways to write a character: each is a sequence of bytes out of sets, none the beginning of
// another.
using Spelling = std::vector<ByteSet>;
void spell_utf8(const CodeSet& set, std::vector<Spelling>& out);
std::vector<Spelling> spellings(const CodeSet& set, Writing writing);
// Any character of a JSON string in any valid escape; a pair of surrogates is one.
std::vector<Spelling> json_character();

// Reads one character of a class, byte by byte, from state 0 back to state 0.
struct CharacterReader {
  static constexpr uint8_t kDead = 255;
  std::vector<std::array<uint8_t, 256>> next;  // by state and byte

  explicit CharacterReader(const std::vector<Spelling>& spellings);
  size_t first_bytes() const;  // how many bytes begin a character
  bool operator==(const CharacterReader& other) const { return next == other.next; }
};

}  // namespace pocketslm::grammar
